"Everything of `fasterai_clone.core`"
from .granularity import *
from .criteria import *
from .schedule import *
from .selection import *
from .masks import *
from .flow import *
from .measure import *
from .context import *
