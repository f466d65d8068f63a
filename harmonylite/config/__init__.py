"""The configuration: `load` turns a TOML file into a `Config`, or raises `ConfigError` with every mistake."""

from harmonylite.config.describe import describe, describe_data
from harmonylite.config.load import ConfigError, find, load, remarks_here
from harmonylite.config.model import Config, Problem
from harmonylite.config.values import Address, Secret, ServerUrl, mask_url, one_line, split_address

__all__ = [
    "Address",
    "Config",
    "ConfigError",
    "Problem",
    "Secret",
    "ServerUrl",
    "describe",
    "describe_data",
    "find",
    "load",
    "mask_url",
    "one_line",
    "remarks_here",
    "split_address",
]
