// Python face of the codec, the kernels and the update pipeline.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <functional>
#include <memory>
#include <tuple>

#include "bindings.h"
#include "optim/quant_map.h"
#include "optim/update_pipeline.h"

namespace py = pybind11;

namespace offload {

namespace {

using optim::Codec;
using optim::GradDtype;
using optim::Hyper;

Codec codec_of(const std::string& name) {
  if (name == "split_bf16") return Codec::split_bf16;
  if (name == "fp32") return Codec::fp32;
  throw py::value_error("param_codec must be split_bf16 or fp32, not " + name);
}

GradDtype grad_dtype_of(const std::string& name) {
  if (name == "float32") return GradDtype::float32;
  if (name == "bfloat16") return GradDtype::bfloat16;
  throw py::value_error("grad_dtype must be float32 or bfloat16, not " + name);
}

optim::Rule rule_of(const std::string& name) {
  if (name == "adamw") return optim::Rule::adamw;
  if (name == "sgd") return optim::Rule::sgd;
  if (name == "lion") return optim::Rule::lion;
  if (name == "callback") return optim::Rule::callback;
  throw py::value_error("rule must be adamw, sgd, lion or callback, not " + name);
}

optim::StatePlanes planes_of(const std::vector<std::string>& names) {
  optim::StatePlanes planes;
  for (const std::string& name : names) {
    if (name == "float32")
      planes.push_back(optim::PlaneKind::float32);
    else if (name == "bfloat16")
      planes.push_back(optim::PlaneKind::bfloat16);
    else if (name == "int8")
      planes.push_back(optim::PlaneKind::int8);
    else if (name == "uint8")
      planes.push_back(optim::PlaneKind::uint8);
    else
      throw py::value_error("a state plane is float32, bfloat16, int8 or uint8, not " + name);
  }
  return planes;
}

optim::PlaneKind quantised_of(const std::string& name) {
  const optim::PlaneKind kind = planes_of({name}).front();
  if (!optim::is_quantised(kind)) throw py::value_error("a plane of codes is int8 or uint8, not " + name);
  return kind;
}

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Destruction waits for what is queued, and never with the GIL held.
struct DeletePipeline {
  void operator()(optim::UpdatePipeline* pipeline) const {
    if (pipeline->inherited()) return;  // after a fork its threads cannot be joined: the child leaves it alone
    const ReleasedGil released;
    delete pipeline;
  }
};
using PipelineHolder = std::unique_ptr<optim::UpdatePipeline, DeletePipeline>;

// The function of a job, which any thread may call and which the last one drops: both with the GIL. It is given
// (segment, first element, elements, addresses of param, lo, gradient and of each state plane); what it raises fails
// the job with the text of the exception.
std::function<io::Error(const optim::CallbackPiece&)> callback_of(const py::object& given, std::size_t n_planes) {
  if (given.is_none()) return nullptr;
  const std::shared_ptr<py::object> function(new py::object(given), [](py::object* held) {
    const py::gil_scoped_acquire gil;
    delete held;
  });
  return [function, n_planes](const optim::CallbackPiece& piece) -> io::Error {
    const py::gil_scoped_acquire gil;
    try {
      std::vector<std::uintptr_t> state;
      for (std::size_t i = 0; i < n_planes; ++i)
        state.push_back(reinterpret_cast<std::uintptr_t>(piece.planes.state[i]));
      (*function)(piece.segment, piece.planes.element, piece.n, reinterpret_cast<std::uintptr_t>(piece.planes.param),
                  reinterpret_cast<std::uintptr_t>(piece.planes.lo),
                  reinterpret_cast<std::uintptr_t>(piece.planes.grad), state);
    } catch (const std::exception& error) {
      return {EINVAL, std::string("the optimizer's update failed: ") + error.what()};
    }
    return {};
  };
}

optim::UpdateJob make_job(const std::string& rule, const std::vector<std::string>& state_planes,
                          const py::object& callback, const std::string& param_codec, std::size_t n_elements,
                          std::uintptr_t param_address, std::int64_t param_offset, bool read_param,
                          std::int64_t state_offset, std::uintptr_t state_host_address, std::size_t host_chunks,
                          std::uintptr_t grad_address, const std::string& grad_dtype, std::int64_t grad_offset,
                          std::shared_ptr<io::Ticket> grad_gate, std::int64_t tag, bool reorders, bool held,
                          std::int64_t param_out_offset, std::int64_t state_out_offset,
                          std::uintptr_t checksums_address, std::uintptr_t expected_address,
                          const std::vector<std::tuple<std::size_t, std::size_t, Hyper>>& segments,
                          std::vector<std::pair<std::size_t, std::size_t>> only,
                          std::shared_ptr<io::Ticket> write_gate) {
  optim::UpdateJob job;
  job.rule = rule_of(rule);
  job.planes = planes_of(state_planes);
  job.callback = callback_of(callback, job.planes.size());
  job.codec = codec_of(param_codec);
  job.n_elements = n_elements;
  job.param = at<char>(param_address);
  job.param_offset = param_offset;
  job.read_param = read_param;
  job.state_offset = state_offset;
  job.state_host = at<char>(state_host_address);
  job.host_chunks = host_chunks;
  job.grad = at<const char>(grad_address);
  job.grad_dtype = grad_dtype_of(grad_dtype);
  job.grad_offset = grad_offset;
  job.grad_gate = std::move(grad_gate);
  job.tag = tag;
  job.reorders = reorders;
  job.held = held;
  job.param_out_offset = param_out_offset;
  job.state_out_offset = state_out_offset;
  job.checksums = at<std::uint32_t>(checksums_address);
  job.expected = at<const std::uint32_t>(expected_address);
  for (const auto& [start, n, hyper] : segments) job.segments.push_back({start, n, hyper});
  job.only = std::move(only);
  job.write_gate = std::move(write_gate);
  return job;
}

}  // namespace

void bind_optim(py::module_& module) {
  module.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const auto& entry : optim::kernels()) names.push_back(entry.level);
    return names;
  });
  module.def(
      "split_master",
      [](std::uintptr_t source, std::uintptr_t hi, std::uintptr_t lo, std::size_t n, const std::string& level) {
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        chosen.split(at<const float>(source), at<std::uint16_t>(hi), at<std::int16_t>(lo), n);
      },
      py::arg("source"), py::arg("hi"), py::arg("lo"), py::arg("n"), py::arg("level") = "auto");
  module.def(
      "merge_master",
      [](std::uintptr_t hi, std::uintptr_t lo, std::uintptr_t destination, std::size_t n, const std::string& level) {
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        chosen.merge(at<const std::uint16_t>(hi), at<const std::int16_t>(lo), at<float>(destination), n);
      },
      py::arg("hi"), py::arg("lo"), py::arg("destination"), py::arg("n"), py::arg("level") = "auto");
  module.def(
      "canonicalize_nan",
      [](std::uintptr_t values, std::size_t n) { optim::kernels().back().canonicalize_nan(at<float>(values), n); },
      py::arg("values"), py::arg("n"), py::call_guard<ReleasedGil>());

  py::class_<Hyper>(module, "Hyper")
      .def(py::init([](double lr, double beta1, double beta2, double eps, double weight_decay, std::int64_t step,
                       bool decoupled, double grad_scale, bool maximize, double momentum, double dampening,
                       bool nesterov, std::uint64_t noise_seed, std::uint64_t noise_origin) {
             if (step < 1) throw py::value_error("step counts from 1");
             return Hyper{lr,         beta1,    beta2,    eps,       weight_decay, step,       decoupled,
                          grad_scale, maximize, momentum, dampening, nesterov,     noise_seed, noise_origin};
           }),
           py::arg("lr"), py::arg("beta1") = 0.0, py::arg("beta2") = 0.0, py::arg("eps") = 0.0,
           py::arg("weight_decay") = 0.0, py::arg("step") = 1, py::arg("decoupled") = true, py::arg("grad_scale") = 1.0,
           py::arg("maximize") = false, py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
           py::arg("nesterov") = false, py::arg("noise_seed") = 0, py::arg("noise_origin") = 0)
      .def_readonly("lr", &Hyper::lr)
      .def_readonly("beta1", &Hyper::beta1)
      .def_readonly("beta2", &Hyper::beta2)
      .def_readonly("eps", &Hyper::eps)
      .def_readonly("weight_decay", &Hyper::weight_decay)
      .def_readonly("step", &Hyper::step)
      .def_readonly("decoupled", &Hyper::decoupled)
      .def_readonly("grad_scale", &Hyper::grad_scale)
      .def_readonly("maximize", &Hyper::maximize)
      .def_readonly("momentum", &Hyper::momentum)
      .def_readonly("dampening", &Hyper::dampening)
      .def_readonly("nesterov", &Hyper::nesterov);

  module.def(
      "record_nbytes",
      [](const std::string& param_codec, const std::vector<std::string>& state_planes, std::size_t n) {
        return optim::record_nbytes(codec_of(param_codec), planes_of(state_planes), n);
      },
      py::arg("param_codec"), py::arg("state_planes"), py::arg("n"));
  module.def(
      "quant_map",
      [](bool is_signed) {
        const optim::QuantMap& map = optim::quant_map(is_signed);
        return std::vector<float>(map.value, map.value + 256);
      },
      py::arg("is_signed"));
  module.def(
      "quantise",
      [](const std::string& plane, std::uintptr_t moments, std::uintptr_t codes, std::uintptr_t absmax, std::size_t n,
         const std::string& level) {
        const optim::PlaneKind kind = quantised_of(plane);
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        chosen.quantise(kind, at<const float>(moments), at<std::uint8_t>(codes), at<float>(absmax), n);
      },
      py::arg("plane"), py::arg("moments"), py::arg("codes"), py::arg("absmax"), py::arg("n"),
      py::arg("level") = "auto");
  module.def(
      "dequantise",
      [](const std::string& plane, std::uintptr_t codes, std::uintptr_t absmax, std::uintptr_t moments, std::size_t n,
         const std::string& level) {
        const optim::PlaneKind kind = quantised_of(plane);
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        chosen.dequantise(kind, at<const std::uint8_t>(codes), at<const float>(absmax), at<float>(moments), n);
      },
      py::arg("plane"), py::arg("codes"), py::arg("absmax"), py::arg("moments"), py::arg("n"),
      py::arg("level") = "auto");
  module.def(
      "rule_update",
      [](const std::string& rule, const std::vector<std::string>& state_planes, const std::string& param_codec,
         std::uintptr_t param, std::uintptr_t lo, const std::vector<std::uintptr_t>& state,
         const std::vector<std::uintptr_t>& absmax, std::uintptr_t grad, const std::string& grad_dtype, std::size_t n,
         const Hyper& hyper, std::size_t element, const std::string& level) {
        const auto kinds = planes_of(state_planes);
        if (kinds.size() > 2 || state.size() != kinds.size() || absmax.size() != kinds.size())
          throw py::value_error("give an address of codes and one of absmax for each of at most two state planes");
        optim::Planes planes{};
        planes.param = at<void>(param);
        planes.lo = at<std::int16_t>(lo);
        for (std::size_t i = 0; i < kinds.size(); ++i) {
          planes.state[i] = at<void>(state[i]);
          planes.absmax[i] = at<float>(absmax[i]);
        }
        planes.grad = at<const void>(grad);
        planes.element = element;
        const auto which = rule_of(rule);
        if (which == optim::Rule::callback) throw py::value_error("a callback is no kernel");
        const auto codec = codec_of(param_codec);
        const auto dtype = grad_dtype_of(grad_dtype);
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        chosen.update(which, codec, dtype, kinds, planes, n, optim::scalars_of(which, hyper));
      },
      py::arg("rule"), py::arg("state_planes"), py::arg("param_codec"), py::arg("param"), py::arg("lo"),
      py::arg("state"), py::arg("absmax"), py::arg("grad"), py::arg("grad_dtype"), py::arg("n"), py::arg("hyper"),
      py::arg("element") = 0, py::arg("level") = "auto");
  module.def(
      "adamw_update",
      [](const std::string& param_codec, std::uintptr_t param, std::uintptr_t lo, std::uintptr_t exp_avg,
         std::uintptr_t exp_avg_sq, std::uintptr_t grad, const std::string& grad_dtype, std::size_t n,
         const Hyper& hyper, const std::string& level) {
        const optim::Planes planes{at<void>(param),
                                   at<std::int16_t>(lo),
                                   {at<void>(exp_avg), at<void>(exp_avg_sq)},
                                   {},
                                   at<const void>(grad),
                                   0};
        const auto codec = codec_of(param_codec);
        const auto dtype = grad_dtype_of(grad_dtype);
        const optim::Kernels& chosen = optim::kernels_at(level);
        const ReleasedGil released;
        constexpr auto rule = optim::Rule::adamw;
        const optim::StatePlanes kinds(2, optim::PlaneKind::float32);
        chosen.update(rule, codec, dtype, kinds, planes, n, optim::scalars_of(rule, hyper));
      },
      py::arg("param_codec"), py::arg("param"), py::arg("lo"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
      py::arg("grad"), py::arg("grad_dtype"), py::arg("n"), py::arg("hyper"), py::arg("level") = "auto");

  py::class_<optim::UpdateJob>(module, "UpdateJob")
      .def(py::init(&make_job), py::kw_only(), py::arg("rule") = "adamw",
           py::arg("state_planes") = std::vector<std::string>{"float32", "float32"}, py::arg("callback") = py::none(),
           py::arg("param_codec"), py::arg("n_elements"), py::arg("param_address"), py::arg("param_offset") = -1,
           py::arg("read_param") = false, py::arg("state_offset") = -1, py::arg("state_host_address") = 0,
           py::arg("host_chunks") = 0, py::arg("grad_address") = 0, py::arg("grad_dtype") = "float32",
           py::arg("grad_offset") = -1, py::arg("grad_gate") = py::none(), py::arg("tag") = -1,
           py::arg("reorders") = false, py::arg("held") = false, py::arg("param_out_offset") = -1,
           py::arg("state_out_offset") = -1, py::arg("checksums_address") = 0, py::arg("expected_address") = 0,
           py::arg("segments"), py::arg("only") = std::vector<std::pair<std::size_t, std::size_t>>{},
           py::arg("write_gate") = py::none());

  py::class_<optim::UpdatePipeline, PipelineHolder>(module, "UpdatePipeline")
      .def(py::init([](std::shared_ptr<io::Engine> engine, std::size_t chunk_elements, std::size_t n_buffers,
                       std::size_t n_threads, std::uintptr_t buffer_address, std::size_t buffer_nbytes,
                       std::size_t record_nbytes_per_element) {
             return PipelineHolder(new optim::UpdatePipeline(std::move(engine), chunk_elements, n_buffers, n_threads,
                                                             at<char>(buffer_address), buffer_nbytes,
                                                             record_nbytes_per_element));
           }),
           py::arg("engine").none(true), py::arg("chunk_elements"), py::arg("n_buffers"), py::arg("n_threads"),
           py::arg("buffer_address"), py::arg("buffer_nbytes"),
           py::arg("record_nbytes_per_element") = optim::kRecordNbytesPerElement)
      .def_static("buffer_nbytes_required", &optim::UpdatePipeline::buffer_nbytes_required, py::arg("chunk_elements"),
                  py::arg("n_buffers"), py::arg("record_nbytes_per_element") = optim::kRecordNbytesPerElement)
      .def("submit", &optim::UpdatePipeline::submit, py::arg("job"), py::call_guard<ReleasedGil>())
      .def("turn", &optim::UpdatePipeline::turn, py::call_guard<ReleasedGil>())
      .def("stats",
           [](const optim::UpdatePipeline& pipeline) {
             return py::dict(
                 py::arg("kernel_s") = pipeline.kernel_seconds(), py::arg("wait_read_s") = pipeline.wait_read_seconds(),
                 py::arg("verify_s") = pipeline.verify_seconds(), py::arg("chunks") = pipeline.chunks_updated());
           })
      .def("record_spans", &optim::UpdatePipeline::record_spans, py::arg("on"))
      .def("take_spans",
           [](optim::UpdatePipeline& pipeline) {
             std::vector<std::tuple<std::string, std::int64_t, double, double>> spans;
             for (const auto& span : pipeline.take_spans())
               spans.emplace_back(std::string(1, span.kind), span.tag, span.start_s, span.end_s);
             return spans;
           })
      .def("kernel_seconds", &optim::UpdatePipeline::kernel_seconds)
      .def("close", &optim::UpdatePipeline::close, py::call_guard<ReleasedGil>());
}

}  // namespace offload
