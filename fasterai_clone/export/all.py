"""Make the zeros of pruned models pay: small files, faster layers, verified exports:
`from fasterai_clone.export.all import *`"""
from .sparse_files import *
from .sparse_layers import *
from .onnx import *
from .openvino import *
from .learner_callback import *
