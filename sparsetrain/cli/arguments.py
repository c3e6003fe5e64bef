"""Command-line arguments of a verb that takes settings: Hydra's options with their values, and overrides."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsetrain.errors import UserError, check_choice, nearest

_VALUED = {"--cfg": "-c", "--package": "-p", "--info": "-i"}
_PLAIN = {"--multirun": "-m", "--resolve": "", "--hydra-help": ""}
_SHORT = {"--force": "force=true"}  # options that abbreviate a setting
ANYWHERE = ("--config-dir", "--plugin")
"""Options that `main` takes out before a verb sees its words; they may stand before the verb as well."""

_CHOICES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}


@dataclass
class Arguments:
    """The arguments typed after a verb: options with their values, and overrides."""

    options: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, verb: str, arguments: list[str]) -> Arguments:
        """Return the arguments, separated into options and overrides.

        Raises:
            UserError: an option is unknown, or lacks the value that it needs.
        """
        found = cls()
        long = {short: name for name, short in (_VALUED | _PLAIN).items() if short}
        left = list(arguments)
        while left:
            word = left.pop(0)
            if not word.startswith("-") or word in _SHORT:
                found.overrides.append(_SHORT.get(word, word))
                continue
            said, equals, value = word.partition("=")
            name = long.get(said, said)
            if name not in _VALUED | _PLAIN:
                known = (*_VALUED, *_PLAIN, *_SHORT, *long, *ANYWHERE, "--help")
                raise UserError(f"no option '{said}'{nearest(said, known)}; settings are written key=value")
            if name in _VALUED and not equals:
                if left and (name != "--info" or left[0] in _CHOICES[name]):
                    value = left.pop(0)
                elif name != "--info":
                    raise UserError(f"{said} needs a value: {', '.join(_CHOICES.get(name, ('a name',)))}")
                else:
                    value = "all"
            if name in _CHOICES:
                check_choice(said, value, _CHOICES[name])
            found.options[name] = value
        if "--resolve" in found.options and "--cfg" not in found.options:
            raise UserError(f"--resolve goes with --cfg: sparsetrain {verb} --cfg job --resolve")
        if found.multirun and found.asks:
            asked = next(name for name in found.options if name != "--multirun")
            raise UserError(f"{asked} and -m: give one of them; sparsetrain plan {verb} -m ... shows the points")
        return found

    @property
    def multirun(self) -> bool:
        return "--multirun" in self.options

    @property
    def asks(self) -> bool:
        """Whether the options only ask about the configuration, so that nothing is run."""
        return any(name in self.options for name in ("--cfg", "--package", "--info", "--hydra-help"))
