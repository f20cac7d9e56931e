"""The recipes of docs/recipes.md: the blocks of each, what runs them, and what must come out."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recipe_page
import talking_models
import torch
import transformers
from drop_in_cases import close
from exafuse.cli import commands as cli
from test_serve import serving_process

OWN, DROP_IN, CONSOLE = "own graph", "drop-in", "console"
PAGE = recipe_page.read()
NAMES = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": "exaone4",
    "Qwen/Qwen2-7B-Instruct": "qwen2",
    "meta-llama/Llama-3.2-1B": "llama",
}
HEADS = {
    "meta-llama/Llama-3.2-1B": "causal_lm",
    "my-classifier": "sequence_classification",
    "my-tagger": "token_classification",
    "my-reader": "question_answering",
}
MODELS = ("model", "chat", "complete")
Namespace = dict[str, Any]
SCORES = ("loss", "hidden", "scores", "class_loss", "tags", "starts", "ends", "span_loss")


@dataclass
class Ran:
    """What is left of the blocks of each kind: ``plain`` are the drop-in ones without us.
    ``printed``: by all. ``answers``: of a server."""

    own: Namespace = field(default_factory=dict)
    drop_in: Namespace = field(default_factory=dict)
    plain: Namespace = field(default_factory=dict)
    printed: str = ""
    answers: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Recipe:
    """How a recipe is run. ``blocks``: their kinds, in order. ``own``, ``drop_in``: the variables
    that must be as in plain transformers. ``after``: the recipe whose blocks go before.
    ``needs``: packages that are optional."""

    blocks: tuple[str, ...]
    own: tuple[str, ...] = ()
    drop_in: tuple[str, ...] = ()
    after: str | None = "Load"
    check: Callable[[Ran], None] | None = None
    needs: tuple[str, ...] = ()


def _thinking(ran: Ran) -> None:
    assert ran.own["answer"] == "3.9 is larger."
    assert ran.own["short"] == "3.9"


def _tools(ran: Ran) -> None:
    assert ran.own["answer"] == "It has 21 degrees."
    assert [call.name for call in ran.own["reply"].tool_calls] == ["get_weather"]
    assert ran.drop_in["calls"] == ran.plain["calls"] == ran.own["reply"].tool_calls


def _pipelines(ran: Ran) -> None:
    assert ran.plain["answer"] == "It is Seoul."
    assert ran.plain["text"] == talking_models.PLAIN + " light."


def _from_config(ran: Ran) -> None:
    for family, logits in ran.own["logits"].items():
        sees = family == "exaone4_5"
        auto = (
            transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        )
        model = auto.from_pretrained(f"small-{family}")
        close(logits.detach(), model(ran.own["ids"]).logits.detach())
        close(ran.drop_in["logits"][family].detach(), ran.plain["logits"][family].detach())


def _visible(ran: Ran) -> None:
    assert "last 24     RoPE" in ran.printed
    rows = [line for line in ran.printed.splitlines() if line.startswith("'")]
    drawn = [line.partition("|")[0] for line in rows[: len(rows) // 2]]
    assert rows == 2 * rows[: len(drawn)], "after exafuse was registered, and plain"
    assert [row.count("■") for row in drawn] == list(range(1, len(drawn) + 1)), "a causal mask"


def _command_line(ran: Ran) -> None:
    assert ran.printed.startswith("It is Seoul.\n")


def _server(ran: Ran) -> None:
    said, call = ran.answers
    assert (said["message"]["content"], said["finish_reason"]) == ("It is Seoul.", "stop")
    (tool_call,) = call["message"]["tool_calls"]
    assert tool_call["function"]["name"] == "get_weather"
    assert json.loads(tool_call["function"]["arguments"]) == {"city": "Seoul"}
    assert call["finish_reason"] == "tool_calls"


RECIPES = {
    "Load": Recipe((OWN, DROP_IN), after=None),
    "Chat": Recipe((OWN, OWN, DROP_IN), own=("answer", "ids"), drop_in=("answer", "ids")),
    "Thinking": Recipe(
        (OWN, DROP_IN),
        own=("thoughts", "answer"),
        drop_in=("thoughts", "answer"),
        check=_thinking,
    ),
    "Tools": Recipe((OWN, DROP_IN, DROP_IN), own=("answer",), drop_in=("answer",), check=_tools),
    "Presence penalty": Recipe((OWN, DROP_IN), own=("answer",), drop_in=("answer", "ids")),
    "Pipelines": Recipe((DROP_IN,), drop_in=("answer", "text"), after=None, check=_pipelines),
    "Static cache": Recipe((OWN, DROP_IN), own=("ids",), drop_in=("ids",), after=None),
    "Quantised weights": Recipe(
        (OWN, DROP_IN),
        own=("ids", "scores"),
        drop_in=("ids", "scores", "small_ids"),
        after=None,
        needs=("torchao", "bitsandbytes"),
    ),
    "int4 on a GPU": Recipe(
        (OWN, DROP_IN), own=("ids",), drop_in=("ids",), after=None, needs=("torchao",)
    ),
    "A model from a config": Recipe((OWN, DROP_IN), after=None, check=_from_config),
    "Heads and losses": Recipe((OWN, DROP_IN), own=SCORES, drop_in=SCORES, after=None),
    "What a token sees": Recipe((CONSOLE, DROP_IN), after=None, check=_visible),
    "The command line": Recipe((CONSOLE,), after=None, check=_command_line),
    "A server": Recipe(
        (CONSOLE,), after=None, check=_server, needs=("fastapi", "uvicorn", "openai")
    ),
}
# Run by tests/recipes_that_see.py, with torchvision.
SEEING = {
    "Images": Recipe(
        (OWN, DROP_IN), own=("ids", "same_ids"), drop_in=("ids", "same_ids"), after=None
    ),
    "Video": Recipe((OWN, DROP_IN), drop_in=("ids",), after="Images"),
}


def run(title: str, replaced: Mapping[str, str], ran: Ran | None = None) -> Ran:
    """Every block of a recipe, and before them those of the recipe that it goes on from."""
    ran = ran or Ran()
    after = (RECIPES | SEEING)[title].after
    if after is not None:
        run(after, replaced, ran)
    for block in PAGE[title]:
        if block.kind == OWN:
            torch.manual_seed(0)
            block.run(ran.own, replaced)
        elif block.kind == DROP_IN:
            torch.manual_seed(0)
            block.run(ran.drop_in, replaced)
            torch.manual_seed(0)
            block.plain().run(ran.plain, replaced)
        else:
            run_commands(recipe_page.replace(block.source, replaced), ran)
    return ran


def run_commands(source: str, ran: Ran) -> None:
    """The commands of a console block; what a server answers to ``curl`` is kept in ``ran``."""
    with ExitStack() as stack:
        address = None
        for text in source.removeprefix("$ ").split("\n$ "):
            program, *arguments = shlex.split(text)
            if [program, *arguments[:1]] == ["exafuse", "serve"]:
                folder, *options = arguments[1:]
                assert options == ["--port", "8000"]
                _, address = stack.enter_context(serving_process(Path(folder)))
            elif program == "curl":
                assert address is not None
                url, _, header, _, data = arguments
                assert arguments[1::2] == ["-H", "-d"]
                url = url.replace("http://127.0.0.1:8000", address)
                headers = dict([header.split(": ")])
                request = urllib.request.Request(url, data.encode(), headers)
                with urllib.request.urlopen(request, timeout=120) as response:
                    ran.answers.append(json.load(response)["choices"][0])
            else:
                assert program == "exafuse", f"not run: {text}"
                assert cli.main(arguments) == 0


def implementations(namespace: Namespace) -> set[str]:
    """The attention of every transformers model that a block left behind."""
    values = [*namespace.values(), *namespace.get("models", ())]
    values = [getattr(value, "model", value) for value in values]
    values = [value for value in values if isinstance(value, transformers.PreTrainedModel)]
    return {value.config.get_text_config()._attn_implementation for value in values}


@torch.no_grad()
def logits(value: Any, ran: Ran) -> torch.Tensor:
    """Of a model, or a pipeline's, on the ids or the pictures of the plain blocks: the small models
    are so sure of their replies that these would survive an error."""
    model = value.model if isinstance(value, transformers.Pipeline) else value
    inputs = ran.plain.get("inputs", {})
    if "pixel_values" not in inputs and "pixel_values_videos" not in inputs:
        inputs = {"input_ids": ran.plain.get("ids", torch.arange(5, 60)[None])}
    return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits


def check_against_plain(recipe: Recipe, ran: Ran) -> None:
    for results, namespace in ((recipe.own, ran.own), (recipe.drop_in, ran.drop_in)):
        for name in results:
            result, expected = namespace[name], ran.plain[name]
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                close(result.detach(), expected.detach())
            elif isinstance(result, torch.Tensor):
                assert result.tolist() == expected.tolist(), name
            else:
                assert result == expected, name
    for results, namespace in ((recipe.own, ran.own), (recipe.drop_in, ran.drop_in)):
        for name in MODELS if results else ():
            if name in namespace:
                close(logits(namespace[name], ran), logits(ran.plain[name], ran))
    if recipe.drop_in or "models" in ran.plain:
        assert "exafuse" not in implementations(ran.plain)
        assert implementations(ran.drop_in) == {"exafuse"}
