"""The whole zoo, by family."""

from . import dit, llm, mmdit, qwen, unet, video
from .family import Family


MODULES = (unet, mmdit, qwen, dit, llm, video)

FAMILIES: dict[str, Family] = {}
for module in MODULES:
    if taken := FAMILIES.keys() & module.FAMILIES.keys():
        raise ValueError(f"{module.__name__} names {sorted(taken)}, which another module has already.")
    FAMILIES |= module.FAMILIES
