"""C sources as small libraries, compiled where they are used; where there is no compiler, torch does the work.

Each function here is a lowering: the Python it stands for is the definition, and a test compares the two.
"""

from fnlm.clib.adam import adamw_, square_sum
from fnlm.clib.build import Status, built, library
from fnlm.clib.normal import normal_

__all__ = ["Status", "adamw_", "built", "library", "normal_", "square_sum"]
