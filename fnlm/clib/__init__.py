"""C sources as small libraries, compiled where they are used; where there is no compiler, torch does the work.

Each function here is a lowering: the Python it stands for is the definition, and a test compares the two.
"""

from fnlm.clib.adam import adamw_, square_sum
from fnlm.clib.attend import How, attend, attend_backward, attend_cached, can_attend, can_cache
from fnlm.clib.build import Status, built, library
from fnlm.clib.normal import normal_
from fnlm.clib.rows import activate_backward, activated, activated_with_factors, has_rows, norm_backward, normed

__all__ = [
    "How",
    "Status",
    "activate_backward",
    "activated",
    "activated_with_factors",
    "adamw_",
    "attend",
    "attend_backward",
    "attend_cached",
    "built",
    "can_attend",
    "can_cache",
    "has_rows",
    "library",
    "norm_backward",
    "normal_",
    "normed",
    "square_sum",
]
