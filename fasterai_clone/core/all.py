"Everything of `fasterai_clone.core`"
from .arguments import *
from .tensors import *
from .granularity import *
from .criteria import *
from .names import *
from .schedule import *
from .lazy import *
from .bracket import *
from .selection import *
from .sharded import *
from .masks import *
