"Everything that needs no extra dependency: `from fasterai_clone.all import *`"
from .sparse.all import *
