"""Rewards by name: `"hpsv2"`, `"hpsv2:version=v2.0"`, `"package.module:function"`, `"my_rewards.py:sharpness"`."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import rewards
from .base import Reward, RewardFunc, unwrapped


SEVERAL = "names are separated by spaces on the command line, and are a list in YAML and Python."
EXPECTED = f"Use a name, package.module:function or file.py:function. If these are several: {SEVERAL}"

# User and password of a URL; what follows an option, a key or a flag by such a name, up to the next option.
_NAMES = r"(?:\w*(?:token|secret|auth(?:orization)?|cookie)|(?:\w*_|\bapi|\b)key|pass\w*|pwd?|cred\w*|sig(?:nature)?)"
_SECRETS = re.compile(
    r"(://)\S*@|(=)[^\s:=]+:(?!//)\S*@"
    rf"|((?:{_NAMES}[\"']?\s*[=:]|--{_NAMES}\s)\s*[\"']?(?:(?:bearer|basic) )?)(?:(?!,\s*\w+\s*=)[^\s\"'])+",
    re.IGNORECASE,
)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def resolve_reward(reward: RewardFunc | str) -> RewardFunc:
    """
    A reward function: a callable itself; a name in `slas_trl.rewards`; "package.module:function",
    "package.module.function" or "folder/file.py:function". Options follow after a colon, as in
    "hpsv2:version=v2.0,device=cuda:1": keyword arguments of the function or class, and `process=true` for a process
    of its own.

    Raises:
        `ValueError`: for a reward that does not exist, and options that do not fit.
        `TypeError`: for what cannot be called.
    """
    if isinstance(reward, type):
        raise TypeError(f"The reward {reward.__name__} is a class; pass an instance: {reward.__name__}(...).")
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        kind = type(reward).__name__
        raise TypeError(f"A reward must be a callable or a string, but got a {kind}: {masked(repr(reward))}.")
    place, name, text = split_name(reward)
    shown = shown_name(reward)
    try:
        module = _load_file(str(Path(place).resolve())) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
    except Exception as error:  # whatever the user's module raises
        near = difflib.get_close_matches(reward.split(":")[0], rewards.NAMES, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no reward {shown!r} ({masked(str(error))}). {hint}{EXPECTED}") from error
    made = _with_options(reward, found, text) if callable(found) else found
    if not callable(made):
        raise TypeError(f"The reward {shown!r} is a {type(made).__name__}, which cannot be called.")
    return made


def masked(text: str) -> str:
    """A reward by name, or a text with such, as it may be shown: without passwords of URLs, tokens and keys."""
    return _SECRETS.sub(lambda found: f"{found[3]}***" if found[3] else f"{found[1] or found[2]}***@", text)


def split_name(reward: str) -> tuple[str, str, str]:
    """Module or file, function in it, and options, of the string for a reward."""
    first, _, rest = reward.partition(":")
    if first in rewards.NAMES:
        return "slas_trl.rewards", first, rest
    if ":" not in reward and not reward.endswith(".py"):
        place, _, name = first.rpartition(".")
        return place or "slas_trl.rewards", name, ""
    name, _, options = rest.partition(":")
    return first, name, options


def shown_name(reward: str) -> str:
    """A reward by name as refusals show it: without the values of its options, any of which may be a secret."""
    options = split_name(reward)[2]
    return masked(reward.removesuffix(f":{options}") if options else reward)


def reward_name(reward: RewardFunc) -> str:
    """The name in the logs: the function's, or that of the callable's class."""
    reward = unwrapped(reward)
    return getattr(reward, "__name__", type(reward).__name__)


@functools.cache
def _load_file(path: str) -> ModuleType:
    # Dataclasses, pickle and inspect look modules up by their names: no other module has this one's.
    name = f"{Path(path).stem.replace('.', '_')}@{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).parent))  # for what the file imports from beside it, as a script does
    spec.loader.exec_module(module)
    return module


def _with_options(reward: str, found: Any, text: str) -> RewardFunc:
    shown = shown_name(reward)
    given = _options_in(text, shown)
    parameters = inspect.signature(type(found) if isinstance(found, Reward) else found).parameters.values()
    known = {one.name: str(one.annotation) for one in parameters if one.kind != one.VAR_KEYWORD}
    for name in ("prompts", "images", "completions"):
        known.pop(name, None)
    if "process" in given and "process" not in known and _value("process", given.pop("process"), "bool"):
        others = ",".join(f"{key}={value}" for key, value in given.items())
        place = reward.removesuffix(text).rstrip(":")
        return rewards.ProcessReward(f"{place}:{others}" if others else place)
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"The reward {shown!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
    try:
        options = {key: _value(key, value, known[key]) for key, value in given.items()}
        if isinstance(found, Reward):
            return dataclasses.replace(found, **options)
        if isinstance(found, type):
            return found(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The reward {shown!r} cannot be made: {masked(str(error))}") from error
    return functools.partial(found, **options) if options else found


def _options_in(text: str, shown: str) -> dict[str, str]:
    given = {}
    for part in text.split(",") if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key.isidentifier():
            form = f"The options of the reward {shown!r} must be of the form option=value,option=value."
            raise ValueError(f"{form} If they hold another reward: {SEVERAL}")
        given[key] = value
    return given


def _value(option: str, text: str, annotation: str) -> Any:
    """Text where the annotation has `str`; otherwise a number, true, false or none, if the text is one."""
    if re.search(r"\bstr\b", annotation):
        return text
    # As in YAML, but for its surprises: "1e3" is a number, and "on" and "1:30" are text.
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    if text.lower() not in _WORDS and re.search(r"\b(int|float|bool)\b", annotation):
        raise ValueError(f"the option {option} must be a number, true, false or none, but got {option}={text}.")
    return _WORDS.get(text.lower(), text)
