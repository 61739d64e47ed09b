"""Help texts that list the names of a registry, which is imported when help is printed and not when `iddpm` starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand


def samplers() -> str:
    """Return the names of all samplers."""
    from diffusion.plans import SAMPLERS
    from diffusion.quoting import in_words

    return in_words(SAMPLERS)


def samplers_with_eta() -> str:
    """Return the names of the samplers that take eta."""
    from diffusion import plans
    from diffusion.quoting import in_words

    return in_words(plans.samplers_with_eta())


def recommended_steps() -> str:
    """Return the steps that make sense with each sampler, as `GET /v1/models` lists them."""
    from diffusion.plans import SAMPLERS

    return ", ".join("{}: {} to {}".format(name, *sampler.recommended_steps) for name, sampler in SAMPLERS.items())


def fits() -> str:
    """Return the names of the ways to fit an image to a model's shape."""
    from diffusion.quoting import in_words
    from formats.given_shapes import FITS

    return in_words(FITS)


def backends() -> str:
    """Return the names of all backends."""
    from diffusion.quoting import in_words
    from service.backends.select import BACKENDS

    return in_words(BACKENDS)


PLACEHOLDERS: dict[str, Callable[[], str]] = {
    "{samplers}": samplers,
    "{recommended_steps}": recommended_steps,
    "{fits}": fits,
    "{with_eta}": samplers_with_eta,
    "{backends}": backends,
}


class NamesInHelp(TyperCommand):
    """A command in whose help each placeholder is replaced by the names that it stands for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help. Older versions of typer have the types of the arguments from click, newer ones their own."""
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            for placeholder, names in PLACEHOLDERS.items():
                if text and placeholder in text:
                    text = text.replace(placeholder, names())
                    parameter.help = text  # type: ignore[attr-defined]  # options have it
        super().format_help(ctx, formatter)
