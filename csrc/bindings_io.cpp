// Python face of the I/O engine: argument conversion, GIL release, error translation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <variant>

#include "bindings.h"
#include "common/aligned_buffer.h"
#include "common/crc32c.h"
#include "io/engine.h"
#include "io/file_engine.h"

namespace py = pybind11;

namespace offload {

namespace {

[[noreturn]] void raise_os_error(int code, const std::string& message) {
  PyErr_SetObject(PyExc_OSError, py::make_tuple(code, message).ptr());
  throw py::error_already_set();
}

// The last reference may go from Python or from a worker; closing waits, and never with the GIL held.
void delete_engine(io::Engine* engine) {
  if (engine->inherited()) return;  // after a fork its threads cannot be joined: the child leaves it alone
  if (PyGILState_Check() == 0) {
    delete engine;
    return;
  }
  const ReleasedGil released;
  delete engine;
}

void delete_file_engine(io::FileEngine* engine) {
  if (engine->inherited()) return;
  if (PyGILState_Check() == 0) {
    delete engine;
    return;
  }
  const ReleasedGil released;
  delete engine;
}

std::shared_ptr<io::Ticket> transfer_file(io::FileEngine& engine, io::Op op, const std::variant<int, std::string>& file,
                                          std::uintptr_t address, std::size_t nbytes, std::uint64_t offset) {
  void* const memory = reinterpret_cast<void*>(address);
  if (std::holds_alternative<int>(file)) return engine.submit(op, std::get<int>(file), memory, nbytes, offset);
  return engine.submit(op, std::get<std::string>(file), memory, nbytes, offset);
}

// Waits in slices so that Ctrl-C is seen; the GIL is free inside each.
void wait_ticket(const std::shared_ptr<io::Ticket>& ticket, const std::optional<double>& timeout_s) {
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    bool complete = false;
    {
      const ReleasedGil released;
      complete = ticket->wait_for(std::chrono::milliseconds(50));
    }
    if (complete) break;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (timeout_s && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > *timeout_s) {
      PyErr_SetString(PyExc_TimeoutError, "the transfer has not completed within timeout_s");
      throw py::error_already_set();
    }
  }
  if (ticket->error().code != 0) raise_os_error(ticket->error().code, ticket->error().message);
}

std::shared_ptr<io::Faults> faults_from(const py::dict& settings) {
  auto faults = std::make_shared<io::Faults>();
  for (const auto& [key, value] : settings) {
    const auto name = key.cast<std::string>();
    if (name == "fail_nth")
      faults->fail_nth = value.cast<std::uint64_t>();
    else if (name == "fail_count")
      faults->fail_count = value.cast<std::uint64_t>();
    else if (name == "delay_ms")
      faults->delay_ms = value.cast<std::uint64_t>();
    else if (name == "bytes_per_s")
      faults->bytes_per_s = value.cast<double>();
    else if (name == "power_loss_nth")
      faults->power_loss_nth = value.cast<std::uint64_t>();
    else if (name == "seed")
      faults->seed = value.cast<std::uint64_t>();
    else if (name == "quota_pages")
      faults->quota_pages = value.cast<std::uint64_t>();
    else if (name == "errno")
      faults->error = value.cast<int>();
    else if (name == "short_every")
      faults->short_every = value.cast<std::uint64_t>();
    else if (name == "short_nbytes")
      faults->short_nbytes = value.cast<std::size_t>();
    else if (name == "op") {
      const auto op = value.cast<std::string>();
      faults->reads = op != "write";
      faults->writes = op != "read";
    } else
      throw py::value_error("unknown fault setting " + name);
  }
  return faults;
}

py::dict counters(const io::Engine& engine) {
  std::uint64_t read = 0, written = 0, read_ops = 0, write_ops = 0, submit_calls = 0, in_flight_max = 0;
  py::list drives;
  for (std::size_t i = 0; i < engine.n_drives(); ++i) {
    const io::Counters& drive = engine.counters(i);
    drives.append(py::dict(py::arg("read_bytes") = drive.read_nbytes.load(),
                           py::arg("written_bytes") = drive.written_nbytes.load()));
    read += drive.read_nbytes;
    written += drive.written_nbytes;
    read_ops += drive.read_ops;
    write_ops += drive.write_ops;
    submit_calls += drive.submit_calls;
    in_flight_max = std::max(in_flight_max, drive.in_flight_max.load());
  }
  return py::dict(py::arg("read_bytes") = read, py::arg("written_bytes") = written, py::arg("read_ops") = read_ops,
                  py::arg("write_ops") = write_ops, py::arg("submit_calls") = submit_calls,
                  py::arg("in_flight_max") = in_flight_max, py::arg("drives") = drives);
}

}  // namespace

void bind_io(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });

  module.def(
      "crc32c",
      [](std::uintptr_t address, std::size_t nbytes, std::uint32_t crc, const std::string& level) {
        const void* const from = reinterpret_cast<const void*>(address);
        const ReleasedGil released;
        return level == "auto" ? crc32c(from, nbytes, crc) : crc32c_at(level, from, nbytes, crc);
      },
      py::arg("address"), py::arg("nbytes"), py::arg("crc") = 0, py::arg("level") = "auto");
  module.def("crc32c_join", &crc32c_join, py::arg("first"), py::arg("second"), py::arg("second_nbytes"));
  module.def("crc32c_levels", [] {
    std::vector<std::string> names;
    for (const Crc32cLevel& level : crc32c_levels()) names.push_back(level.name);
    return names;
  });

  py::class_<AlignedBuffer>(module, "Arena", py::buffer_protocol())
      .def(py::init<std::size_t>(), py::arg("nbytes"))
      .def_property_readonly("address",
                             [](const AlignedBuffer& b) { return reinterpret_cast<std::uintptr_t>(b.address()); })
      .def_property_readonly("nbytes", &AlignedBuffer::nbytes)
      .def("keep_on_fork", &AlignedBuffer::keep_on_fork, py::arg("offset"), py::arg("nbytes"))
      .def_buffer([](AlignedBuffer& b) {
        return py::buffer_info(b.address(), 1, py::format_descriptor<std::uint8_t>::format(),
                               static_cast<py::ssize_t>(b.nbytes()));
      });

  py::class_<io::Ticket, std::shared_ptr<io::Ticket>>(module, "Ticket")
      .def(py::init([] { return std::make_shared<io::Ticket>(1); }))
      .def(
          "complete",
          [](io::Ticket& ticket, const std::string& failure) {
            if (ticket.done()) throw py::value_error("this ticket has completed already");
            ticket.settle_piece({failure.empty() ? 0 : EIO, failure});
          },
          py::arg("failure") = "", py::call_guard<ReleasedGil>())
      .def("wait", &wait_ticket, py::arg("timeout_s") = py::none())
      .def("done", &io::Ticket::done)
      .def("times", [](const io::Ticket& ticket) {
        const auto seconds = [](io::Ticket::Clock::time_point at) {
          return std::chrono::duration<double>(at.time_since_epoch()).count();
        };
        if (!ticket.done()) throw py::value_error("this ticket has not completed yet");
        const auto [begun, ended] = ticket.times();
        return std::make_pair(seconds(begun), seconds(ended));
      });

  py::class_<io::Engine, std::shared_ptr<io::Engine>>(module, "Engine")
      .def(py::init([](std::vector<std::string> paths, std::string backend, bool direct, std::size_t block_nbytes,
                       unsigned queue_depth, std::size_t stripe_nbytes, const std::optional<py::dict>& inject) {
             io::EngineOptions options{std::move(paths), std::move(backend), direct, block_nbytes,
                                       queue_depth,      stripe_nbytes,      nullptr};
             if (inject) options.faults = faults_from(*inject);
             return std::shared_ptr<io::Engine>(new io::Engine(std::move(options)), &delete_engine);
           }),
           py::arg("paths"), py::kw_only(), py::arg("backend") = "auto", py::arg("direct") = true,
           py::arg("block_nbytes") = std::size_t{1} << 20, py::arg("queue_depth") = 32,
           py::arg("stripe_nbytes") = std::size_t{1} << 20, py::arg("inject") = py::none())
      .def(
          "read",
          [](io::Engine& engine, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset, bool urgent,
             const std::shared_ptr<io::Ticket>& after) {
            void* const to = reinterpret_cast<void*>(address);
            return after ? engine.submit_after(after, io::Op::read, to, nbytes, offset, urgent)
                         : engine.submit(io::Op::read, to, nbytes, offset, urgent);
          },
          py::arg("address"), py::arg("nbytes"), py::arg("offset"), py::arg("urgent") = false, py::kw_only(),
          py::arg("after") = py::none())
      .def(
          "write",
          [](io::Engine& engine, std::uintptr_t address, std::size_t nbytes, std::uint64_t offset,
             const std::shared_ptr<io::Ticket>& after) {
            void* const from = reinterpret_cast<void*>(address);
            return after ? engine.submit_after(after, io::Op::write, from, nbytes, offset)
                         : engine.submit(io::Op::write, from, nbytes, offset);
          },
          py::arg("address"), py::arg("nbytes"), py::arg("offset"), py::kw_only(), py::arg("after") = py::none())
      .def(
          "register_buffer",
          [](io::Engine& engine, std::uintptr_t address, std::size_t nbytes) {
            return engine.register_buffer(reinterpret_cast<void*>(address), nbytes);
          },
          py::call_guard<ReleasedGil>())
      .def("counters", &counters)
      .def("reopen", &io::Engine::reopen, py::arg("paths"), py::call_guard<ReleasedGil>())
      .def("sync", &io::Engine::sync, py::call_guard<ReleasedGil>())
      .def("cancel", &io::Engine::cancel, py::call_guard<ReleasedGil>())
      .def("close", &io::Engine::close, py::call_guard<ReleasedGil>())
      .def_property_readonly("backend", &io::Engine::backend)
      .def_property_readonly("backend_reason", &io::Engine::backend_reason)
      .def_property_readonly("direct", &io::Engine::direct);

  py::class_<io::FileEngine, std::shared_ptr<io::FileEngine>>(module, "FileEngine")
      .def(py::init([](std::string backend, std::size_t block_nbytes, unsigned queue_depth,
                       const std::optional<py::dict>& inject) {
             io::FileEngineOptions options{std::move(backend), block_nbytes, queue_depth, nullptr};
             if (inject) options.faults = faults_from(*inject);
             return std::shared_ptr<io::FileEngine>(new io::FileEngine(std::move(options)), &delete_file_engine);
           }),
           py::kw_only(), py::arg("backend") = "auto", py::arg("block_nbytes") = std::size_t{1} << 20,
           py::arg("queue_depth") = 32, py::arg("inject") = py::none())
      .def(
          "read",
          [](io::FileEngine& engine, const std::variant<int, std::string>& file, std::uintptr_t address,
             std::size_t nbytes,
             std::uint64_t offset) { return transfer_file(engine, io::Op::read, file, address, nbytes, offset); },
          py::arg("file"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0, py::call_guard<ReleasedGil>())
      .def(
          "write",
          [](io::FileEngine& engine, const std::variant<int, std::string>& file, std::uintptr_t address,
             std::size_t nbytes,
             std::uint64_t offset) { return transfer_file(engine, io::Op::write, file, address, nbytes, offset); },
          py::arg("file"), py::arg("address"), py::arg("nbytes"), py::arg("offset") = 0, py::call_guard<ReleasedGil>())
      .def("counters",
           [](const io::FileEngine& engine) {
             const io::Counters& counted = engine.counters();
             return py::dict(py::arg("read_bytes") = counted.read_nbytes.load(),
                             py::arg("written_bytes") = counted.written_nbytes.load());
           })
      .def("close", &io::FileEngine::close, py::call_guard<ReleasedGil>())
      .def_property_readonly("backend", &io::FileEngine::backend)
      .def_property_readonly("backend_reason", &io::FileEngine::backend_reason);
}

}  // namespace offload
