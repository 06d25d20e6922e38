"""Loops that do nothing but pass batches through a network, by ONNX Runtime and by torch: the limit of serving on a GPU."""

import copy
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Loop:
    "How fast, and how it was run."

    how: str
    rate: float  # pictures a second

    @classmethod
    def of(cls, how: str, once: Callable[[], object], batch: int, seconds: float) -> "Loop":
        "Measure; the first passes pay for memory and chosen kernels."
        for _ in range(5):
            once()
        done, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            once()
            done += batch
        return cls(how, done / took)


def shared(once: Callable[[], object], callers: int, batch: int, seconds: float) -> float:
    "Return pictures a second of several callers at a time."
    with ThreadPoolExecutor(callers) as pool:
        for _ in range(5):
            list(pool.map(lambda _: once(), range(callers)))
        began = time.perf_counter()
        end = began + seconds

        def passes(_: int) -> int:
            done = 0
            while time.perf_counter() < end:
                once()
                done += batch
            return done

        return sum(pool.map(passes, range(callers))) / (time.perf_counter() - began)


def half(graph: bytes) -> bytes:
    "Return the ONNX graph in fp16; inputs and outputs stay fp32."
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    network = onnx.load_from_string(graph)
    return convert_float_to_float16(network, keep_io_types=True).SerializeToString()


def session(graph: bytes, precision: str, cuda: bool, **more: str):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    given = {"use_tf32": "1" if precision == "tf32" else "0"} | more if cuda else {}
    made = ort.InferenceSession(graph, options, providers=[(provider, given)])
    if made.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime fell back to {made.get_providers()}")
    return made


def bound(made, batch: int, size: int, cuda: bool) -> Callable[[], object]:
    "Return what passes one batch that lies on the device, and leaves the answer there."
    import onnxruntime as ort

    place = ("cuda", 0) if cuda else ("cpu", 0)
    x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    classes = made.run(None, {made.get_inputs()[0].name: x})[0].shape[1]
    given = ort.OrtValue.ortvalue_from_numpy(x, *place)
    answer = ort.OrtValue.ortvalue_from_shape_and_type([batch, classes], np.float32, *place)
    binding = made.io_binding()
    binding.bind_ortvalue_input(made.get_inputs()[0].name, given)
    binding.bind_ortvalue_output(made.get_outputs()[0].name, answer)

    def once() -> None:
        made.run_with_iobinding(binding)
        keep  # noqa: B018  the values live as long as the loop

    keep = (given, answer)
    return once


def loops(
    graph: bytes, precision: str, batch: int, size: int, seconds: float, cuda: bool
) -> list[Loop]:
    "Return loops over arrays of the processor, over what lies on the device, and as a CUDA graph."
    x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
    made = session(graph, precision, cuda)
    name = made.get_inputs()[0].name
    found = [Loop.of("arrays", lambda: made.run(None, {name: x}), batch, seconds)]
    found.append(Loop.of("IO binding", bound(made, batch, size, cuda), batch, seconds))
    kinds = {"CUDA graph": {"enable_cuda_graph": "1"}}
    if precision != "fp32":  # where the units want their channels last
        kinds["CUDA graph, channels last"] = kinds["CUDA graph"] | {"prefer_nhwc": "1"}
    for how, more in kinds.items() if cuda else ():
        try:
            one = session(graph, precision, cuda, **more)
            once = bound(one if "graph" not in how else _Unbound(one, made), batch, size, cuda)
            found.append(Loop.of(how, once, batch, seconds))
        except Exception as e:  # one way that does not work leaves the others
            print(how, e, flush=True)
    return found


class _Unbound:
    "A session that is captured at its first pass, and so is not asked by arrays before."

    def __init__(self, made, plain):
        self.made, self.run = made, plain.run

    def __getattr__(self, name: str):
        return getattr(self.made, name)


def new_sizes(graph: bytes, size: int, seconds: float) -> dict[str, tuple[float, float]]:
    "Return, by the search for an algorithm, the milliseconds of a first pass at a new size of batch and the rate at 32."
    found = {}
    for how in ("EXHAUSTIVE", "HEURISTIC", "DEFAULT"):
        made = session(graph, "fp32", True, cudnn_conv_algo_search=how)
        name, took = made.get_inputs()[0].name, []
        for batch in (32, 31, 17, 5):
            x = np.ones((batch, 3, size, size), np.float32)
            began = time.perf_counter()
            made.run(None, {name: x})
            took.append(1e3 * (time.perf_counter() - began))
        rate = Loop.of("", bound(made, 32, size, True), 32, seconds).rate
        found[how] = sum(took[1:]) / 3, rate
    return found


def torch_loops(net, device: str, size: int, seconds: float) -> Iterator[tuple[str, Loop]]:
    "Yield loops of torch over what lies on the device."
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        if device == "cpu" and name == "fp16":
            return
        made = copy.deepcopy(net).to(device, dtype).eval().to(memory_format=torch.channels_last)
        for batch in (1, 32):
            x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            once = _eager(made, x)
            yield f"{name}, batch {batch}", Loop.of("", once, batch, seconds)
            if device == "cuda":
                yield (
                    f"{name}, batch {batch}, CUDA graph",
                    Loop.of("", _captured(made, x), batch, seconds),
                )


def _eager(net, x: torch.Tensor) -> Callable[[], object]:
    def once() -> None:
        with torch.inference_mode():
            net(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return once


def _captured(net, x: torch.Tensor) -> Callable[[], object]:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            net(x)
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph):
        net(x)

    def once() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return once
