"Everything to look at a model and leave it as it was: `from fasterai_clone.model.all import *`"
from .wrappers import *
from .patterns import *
from .run import *
from .preserve import *
from .flow import *
from .flops import *
from .channels.trace import *
from .channels.groups import *
from .attention import *
from .same import *
from .channels.faults import *
