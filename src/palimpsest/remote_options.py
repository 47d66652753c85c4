"""The options of a remote model: where to ask, how fast, at what price, with which key."""

from __future__ import annotations

import logging
import os
import re
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr

from palimpsest.errors import ModelError, UsageError
from palimpsest.plugins import option_values, options
from palimpsest.remote_http import Address, parse_base_url

_IDENTITY = (
    *("base_url", "model", "temperature", "top_p", "send_seed", "max_tokens_key"),
    *("prefill", "context_length"),
)

log = logging.getLogger(__name__)


@options
class RemoteOptions:
    """`[chat_models.NAME]`, or a model's `remote` table: where to ask, how fast, at what price."""

    base_url: str
    """`https://example.com/v1`: what stands before `/chat/completions`."""
    model: str
    """The server's name of the model."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, never the key; empty = no key."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests under way at the same time."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Upper limit, retries included; requests are spaced evenly. None = no limit."""
    connect_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for a connection."""
    read_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds of silence; a server is silent while it generates."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds for one request in all, however slowly the reply drips."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Further requests for an item after one that failed."""
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Before retry k (0, 1, ...): a random wait up to backoff_s 2^k, at most `max_wait_s`."""
    max_wait_s: Annotated[float, Field(ge=0)] = 120.0
    """Longest wait before a retry; an item whose server asks for more is given up for now."""
    stop_after: Annotated[int, Field(ge=0)] = 20
    """Stop when so many items in a row got no answer; 0 = never."""
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    """0 = greedy, as local models are asked; None = not sent (some models refuse it)."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus; None = not sent."""
    send_seed: bool = True
    """Whether `seed` is sent; few servers promise to honour it."""
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the limit of generated tokens."""
    prefill: bool = False
    """Whether it continues an assistant turn (`continue_final_message`: vLLM, SGLang)."""
    context_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompt and answer; an item over it is `too_long`, as for a local model. None =
    what the server says."""
    price_per_million_input: Annotated[float, Field(ge=0)] | None = None
    """Price of a million prompt tokens, in any currency; None = cost not known."""
    price_per_million_output: Annotated[float, Field(ge=0)] | None = None
    """Price of a million generated tokens; None = cost not known."""
    max_reply_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Larger replies are refused."""

    def identity(self) -> dict[str, Any]:
        """Return the options that answers depend on, for a job's fingerprint: no speed, no price."""
        return {key: value for key, value in option_values(self).items() if key in _IDENTITY}


def check_remote(options: RemoteOptions) -> Address:
    """Return the address, with everything checked that needs no network and no key.

    Call it before a recipe is stored: a key in the place of its variable's name is refused here.

    Raises:
        UsageError: base_url or api_key_env is wrong, or only one of the two prices is given.
    """
    if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]{0,63})?", options.api_key_env):
        raise UsageError(
            "api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, and "
            "never the key (value not shown: it may be one)"
        )
    if (options.price_per_million_input is None) != (options.price_per_million_output is None):
        raise UsageError("give price_per_million_input and price_per_million_output, or neither")
    return parse_base_url(options.base_url)


def read_key(variable: str, address: Address) -> SecretStr:
    """Return the key that the variable holds; empty without a variable.

    Raises:
        ModelError: the variable is not set, or what it holds cannot be a key.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ModelError(
            f"environment variable {variable} is not set: it must hold the key for {address}"
        )
    if not re.fullmatch(r"[!-~]*", key):
        raise ModelError(
            f"environment variable {variable}: a key is printable ASCII without spaces "
            "(value not shown)"
        )
    if key and not address.is_private:
        log.warning("%s: the key in %s travels unencrypted (http)", address, variable)
    return SecretStr(key)
