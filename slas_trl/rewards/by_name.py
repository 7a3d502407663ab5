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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

from slas_trl import rewards
from slas_trl.rewards.base import Reward


# (prompts, images, **columns) -> a score for each image, or None; or a dictionary of such lists; sync or async
RewardFunc = Callable[..., Any]

# Annotations, how each is read, and its name. The first that fits is taken: where text is meant, none is a word.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "str": (str, "text"),
    "None": (lambda text: {"none": None, "null": None}[text.lower()], "none"),
}

EXPECTED = (
    'Use a name from slas_trl.rewards, with options as in "hpsv2:version=v2.0", or a function of your own as '
    "package.module:function or file.py:function."
)
SEVERAL = "names are separated by spaces on the command line, and are a list in YAML and Python."

# User and password of a URL; what follows an option, a key or a flag by such a name, up to the next option.
_NAMES = r"(?:\w*(?:token|secret|auth(?:orization)?|cookie)|(?:\w*_|\bapi|\b)key|pass\w*|pwd?|cred\w*|sig(?:nature)?)"
_SECRETS = re.compile(
    r"(://)\S*@|(=)[^\s:=]+:(?!//)\S*@"
    rf"|((?:{_NAMES}[\"']?\s*[=:]|--{_NAMES}\s)\s*[\"']?(?:(?:bearer|basic) )?)(?:(?!,\s*\w+\s*=)[^\s\"'])+",
    re.IGNORECASE,
)


def resolve_reward(reward: RewardFunc | str) -> RewardFunc:
    """
    A reward function from a string, or the function itself.

    Args:
        reward (`Callable` or `str`):
            A callable; a name in `slas_trl.rewards`; "package.module:function", "package.module.function" or
            "folder/file.py:function". Options follow after a colon, as in "hpsv2:version=v2.0,device=cuda:1"; they
            are fields of a reward like [`~slas_trl.rewards.HPSv2`], or keyword arguments of a function or class.
            `process=true` among them calls the reward in a process of its own.

    Raises:
        `ValueError`: for a reward that there is not, and options that do not fit.
        `TypeError`: for what cannot be called.
    """
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        kind = type(reward).__name__
        raise TypeError(f"A reward must be a callable or a string, but got a {kind}: {masked(repr(reward))}.")
    place, name, text = split_name(reward)
    shown = shown_name(reward)
    if place.endswith(".py") and not name:
        raise ValueError(
            f'The reward {shown!r} is a file; expected a function of it, as in "{masked(place)}:function".'
        )
    try:
        found = getattr(_module(place), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"There is no reward {shown!r} ({masked(str(error))}).{_hint(reward)} {EXPECTED}") from error
    if not callable(found):
        raise TypeError(f"The reward {shown!r} is a {type(found).__name__}, not a function.")
    made = _with_options(reward, found, text)
    if not callable(made):
        raise TypeError(f"The reward {shown!r} is a {type(made).__name__}, which has no __call__.")
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
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def is_ours(reward: RewardFunc) -> bool:
    """Whether it comes with the package."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return str(getattr(reward, "__module__", "")).startswith("slas_trl.rewards.")


def _hint(reward: str) -> str:
    if "," in reward.split("=")[0]:  # not between options
        return f" If these are several: {SEVERAL}"
    first = reward.split(":")[0]
    near = difflib.get_close_matches(first, rewards.NAMES, n=1) if not {".", "/"} & set(first) else ()
    return f" Did you mean {near[0]!r}?" if near else ""


def _module(place: str) -> ModuleType:
    return _load_file(str(Path(place).resolve())) if place.endswith(".py") else importlib.import_module(place)


@functools.cache
def _load_file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # Dataclasses, pickle and inspect look modules up by their names: no other module's is like this one.
    name = f"{Path(path).stem.replace('.', '_')}@{hashlib.sha256(path.encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).parent))  # as that of a script is, for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if "relative import" in str(error):
            raise ImportError(f"{error}: without its dot, the import finds what is beside {path}") from error
        raise
    return module


def _with_options(reward: str, found: Any, text: str) -> RewardFunc:
    given, shown = {}, shown_name(reward)
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(
                f"The options of the reward {shown!r} must be of the form option=value,option=value. If they hold "
                f"another reward: {SEVERAL}"
            )
        given[key.strip()] = value.strip()
    target = type(found) if isinstance(found, Reward) else found
    known = _options_of(target)
    if "process" in given and "process" not in known:
        from slas_trl.rewards.process import ProcessReward  # which resolves names itself

        if _value(shown, "process", given.pop("process"), bool):
            others = ",".join(f"{key}={value}" for key, value in given.items())
            place = reward.removesuffix(text).rstrip(":")
            return ProcessReward(f"{place}:{others}" if others else place)
    for key in given:
        if key not in known:
            raise ValueError(f"The reward {shown!r} has no option {key!r}; it has {', '.join(known) or 'none'}.")
    options = {key: _value(shown, key, value, known[key]) for key, value in given.items()}
    try:
        if isinstance(found, Reward):
            return dataclasses.replace(found, **options)
        if isinstance(found, type):
            return found(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The reward {shown!r} cannot be made: {masked(str(error))}") from error
    return functools.partial(found, **options) if options else found


def _options_of(target: Callable) -> Mapping[str, Any]:
    """Keyword arguments and their annotations."""
    given_by_us = {"prompts", "images", "completions"} if not isinstance(target, type) else set()
    return {
        name: parameter.annotation
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in given_by_us
    }


def _value(shown: str, option: str, text: str, annotation: Any) -> Any:
    """Of a kind that the annotation has. Where it says nothing, a number, true, false or none; text otherwise."""
    if isinstance(annotation, str):  # from __future__ import annotations
        kinds = [kind.strip() for kind in annotation.split("|")]
    else:
        union = get_origin(annotation) in (Union, UnionType)
        kinds = [getattr(kind, "__name__", "") for kind in (get_args(annotation) if union else [annotation])]
        kinds = ["None" if kind == "NoneType" else kind for kind in kinds]
    fits = "str" in kinds or all(kind in _READERS for kind in kinds)
    expected = [kind for kind in _READERS if kind in kinds] if fits else ["int", "float", "bool", "None", "str"]
    for kind in expected:
        with contextlib.suppress(ValueError, KeyError):
            return _READERS[kind][0](text)
    names = " or ".join(_READERS[kind][1] for kind in expected)
    raise ValueError(
        f"The option {option} of the reward {shown!r} must be {names}, but got {masked(f'{option}={text}')}."
    )
