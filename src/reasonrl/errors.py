"""One tree of errors: catch `ReasonRLError` for all of them.

ReasonRLError
├── ConfigError      a recipe, a setting or a command that cannot work: fix it and start again
├── PluginError      an installed package that cannot be found, imported or used
├── ContractError    a component that broke its interface's promise
├── JudgeError       a judge that raised, or too many judgements that abstained
├── DataError        a prompt file, or a prompt, that cannot be read
├── CheckpointError  weights or a run's state that cannot be read or written
└── RankError        one of several processes failed, and all of them stopped
"""


class ReasonRLError(Exception):
    """Anything reasonrl refuses; the message is one line: found, expected, what to do."""


class ConfigError(ReasonRLError):
    """A recipe, setting or command that cannot work."""


class PluginError(ReasonRLError):
    """An installed package that cannot be found, imported or used."""


class ContractError(ReasonRLError):
    """A component that broke the promise of its interface."""


class JudgeError(ReasonRLError):
    """A judge that raised, or that abstained too often."""


class DataError(ReasonRLError):
    """A prompt, or a file of prompts, that cannot be read."""


class CheckpointError(ReasonRLError):
    """Weights or run state that cannot be read or written."""


class RankError(ReasonRLError):
    """One of several processes failed, and all of them stopped; the message names it and its error."""
