"""A CUDA device that is none: torch's CUDA tensors in host memory, computed by the CPU's kernels, `torch.cuda` beside.

For the code that runs on a GPU only, where there is none: `pytest -p tests.fake_cuda.plugin -m gpu`. Tensors say
`cuda:0`, backward runs in autograd's own thread for that device, and an operation of tensors of both devices fails.
Streams do everything at once and in the order in which it is given: that what comes late is waited for is seen by
tests/device_order.py, and on a GPU. It leans on the inside of one version of torch (`TORCH`), built for CPUs.
"""

TORCH = "2.13"
