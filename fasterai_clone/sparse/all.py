"Everything it takes to sparsify: `from fasterai_clone.sparse.all import *`"
from ..core.all import *
from ..report import *
from .targets import *
from .rule import *
from .sparsifier import *
from .sparsify_callback import *
from .ticket_files import *
from .keep import *
from .tickets import *
from .plots import *
