import os

from ._moved import install

__version__ = "0.0.1"

# ONNX Runtime reads it when it is imported; without it, it keeps a database of its use and reports home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
install()  # old names of modules
