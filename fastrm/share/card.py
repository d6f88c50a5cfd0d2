"""The model card of a run: what was trained on what, how good it is, how it is loaded, and what it is not for.

All of it is read from the run's own files. What they do not say is said to be unknown; of data on this machine the card
has names and no paths.
"""

import json
from pathlib import Path
from typing import Any

import jinja2

from fastrm.config import Config, load_config
from fastrm.data.sources.hub import PREFIX
from fastrm.data.sources.published import PUBLISHED
from fastrm.data_config import SourceConfig
from fastrm.evaluate.accuracy import wilson_interval
from fastrm.evaluate.ratings import FIGURES, shown
from fastrm.evaluate.table import ALL
from fastrm.model.paradigms import paradigm_in
from fastrm.model.places import ADAPTER_CONFIG
from fastrm.model.weight_files import CONFIG

UNKNOWN = "unknown"

_CARD = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string("""
# {{ name }}

{% if writer == "judge" %}
A generative judge: it writes which of two responses to a prompt{{ " with images" if has_images }} is better.
Trained with
{% elif writer == "critic" %}
A critic: it writes a critique of a response to a prompt{{ " with images" if has_images }}, behind which one number is
read, which is larger for responses that people, or the judges of the data below, preferred. Trained with
{% else %}
A scalar reward model: it gives a response to a prompt{{ " with images" if has_images }} one number, which is larger for
responses that people, or the judges of the data below, preferred. Trained with
{% endif %}
fastrm {{ versions.fastrm }}{{ ", beginning with " + base if base }}.

## How good it is

{% if figures %}
Pair accuracy on held-out preferences, with 95 % intervals (Wilson); equal rewards count as wrong.
{% if writer == "critic" %}
The rewards stand behind the critiques of the data; behind critiques of its own it was not measured here.
{% endif %}

| source | preferences | accuracy | 95 % interval |
| --- | --- | --- | --- |
{% for figure in figures %}
| {{ figure.source }} | {{ figure.preferences }} | {{ "%.4f" % figure.accuracy }} | {{ figure.interval }} |
{% endfor %}
{% elif ratings %}
On held-out ratings, which it was trained to give: {{ ratings }}.
{% elif writer == "judge" %}
Not measured by its run; `fastrm eval` measures its verdicts on preferences, as below.
{% else %}
Not measured: the run had no held-out preferences, or its files are not beside the model.
{% endif %}

## What it was trained on

{% if sources %}
| source | on the hub | licence |
| --- | --- | --- |
{% for source in sources %}
| {{ source.name }} | {{ source.hub or "no" }} | {{ source.licence }} |
{% endfor %}

Licences are those that the sets' cards state, as fastrm's table of known sets has them; `unknown` is not a permission.
{% else %}
Unknown: the run's config.yaml is not beside the model.
{% endif %}

## How it was trained

{% if config %}
| setting | value |
| --- | --- |
{% for key, value in recipe.items() %}
| {{ key }} | {{ value }} |
{% endfor %}
{% else %}
Unknown: the run's config.yaml is not beside the model.
{% endif %}

## How to load it

{% if writer %}
fastrm has it write, and measures what it says on preferences:

```sh
hf download {{ repo }} --local-dir {{ name }}
fastrm eval {{ name }} eval.jsonl --json figures.json
```

transformers loads it as a language model, by
`{{ "AutoModelForImageTextToText" if has_images else "AutoModelForCausalLM" }}`. It learnt to answer
this prompt{{ ", behind this system turn" if system }}:
{% if system %}

```text
{{ system }}
```
{% endif %}

```text
{{ prompt }}
```
{% else %}
In fastrm, which computes a prompt once for all its responses:

```python
import fastrm

model = fastrm.RewardModel.from_pretrained("{{ repo }}")
model.score([{"prompt": "2 + 2?", "responses": ["4", "5"]}])
```
{% if not is_adapter %}

In transformers, where `import fastrm.hf` registers the class (no remote code):

```python
import fastrm.hf
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("{{ repo }}")
```

In vLLM, after an export for it, which names the plugin where the head needs one:

```sh
fastrm export {{ repo }} --out served --for vllm
vllm serve served --runner pooling
```
{% else %}

The files are an adapter and a head; fastrm adds them to the base model as it loads. For transformers and vLLM write
a whole model first: `fastrm export {{ repo }} --out merged --for transformers`.
{% endif %}
{% endif %}

## Limits

{% if writer != "judge" %}
- Rewards order the responses to one prompt. Between prompts they cannot be compared, and their scale has no meaning.
{% endif %}
- The figures above are of the data above. Other tasks, languages and lengths were not measured here.
- A policy that is trained against it will find what it wrongly prefers. Watch lengths and read samples.
- The chat template, the anchor and the limits of image sizes are in the files; other ones give other rewards.
""")


def make_card(repo: str, model: Path, run: Path | None, licence: str | None) -> str:
    """Return the README.md of a model for the hub.

    Args:
        repo: owner/name.
        model: its folder.
        run: the run's folder, with config.yaml and summary.json; None: the model is all there is.
        licence: an identifier that the hub knows, as apache-2.0; None: the card states none.
    """
    from huggingface_hub import ModelCardData

    config = load_config(run / "config.yaml") if run is not None and (run / "config.yaml").is_file() else None
    summary = _read(run / "summary.json") if run is not None else {}
    settings = _read(model / CONFIG)
    sources = [] if config is None else [_describe(source) for source in config.data.train]
    base, base_id = _base(config)
    writer = paradigm_in(str(model), settings.get("fastrm")) or {}
    kind, has_images = writer.get("kind", ""), "vision_config" in settings
    tasks = ("image-text-to-text", "text-generation") if kind else (None, "text-classification")
    about = ModelCardData(
        license=licence, library_name="fastrm", tags=[kind or "reward-model", "fastrm"], base_model=base_id,
        datasets=list(dict.fromkeys(source["hub"] for source in sources if source["hub"])) or None,
        pipeline_tag=tasks[not has_images],
    )  # fmt: skip
    text = _CARD.render(
        name=repo.rpartition("/")[2], repo=repo, base=base, sources=sources, config=config,
        writer=kind, **{name: writer.get("spec", {}).get(name, "") for name in ("system", "prompt")},
        has_images=has_images, is_adapter=(model / ADAPTER_CONFIG).is_file(),
        figures=_figures(summary), ratings=_ratings(summary), recipe={} if config is None else _recipe(config, summary),
        versions={"fastrm": "(version unknown)", **summary.get("versions", {})},
    )  # fmt: skip
    return f"---\n{about.to_yaml()}\n---\n{text}\n"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _base(config: Config | None) -> tuple[str, str | None]:
    """Return what the run began with, in words, and its hub id if it has one."""
    path = None if config is None else config.model.path
    if path is None:
        return ("" if config is None else "random weights"), None
    if Path(path).exists() or path.count("/") != 1 or path.startswith("."):
        return f"a local folder named {Path(path).name}", None
    return path, path


def _describe(source: SourceConfig) -> dict[str, str | None]:
    """Return the name, the hub id and the licence of a source of data."""
    path = source.path or ""
    hub = path.removeprefix(PREFIX).partition(":")[0] if source.set is None and path.startswith(PREFIX) else None
    known = PUBLISHED.get(source.set or "")
    if hub is not None:
        hub = "/".join(hub.split("/")[:2])
        known = next((one for one in PUBLISHED.values() if one.hub == hub), None)
    name = source.name or source.set or hub or (path if path.startswith("digits:") else Path(path).stem)
    return {
        "name": name, "hub": hub if known is None else known.hub, "licence": UNKNOWN if known is None else known.licence
    }  # fmt: skip


def _figures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracy of the exported step; by source only if the last evaluation, which has them, is its own."""
    sources = {} if "eval_mse" in summary else summary.get("eval_by_source") or {}
    found = {name: (one["accuracy"], one["preferences"]) for name, one in sources.items() if "accuracy" in one}
    count = sum(preferences for _, preferences in found.values())
    if not found:
        return []
    if summary.get("exported_step", summary.get("steps")) != summary.get("steps"):
        found = {ALL: (summary["best_accuracy"], count)}
    elif len(found) > 1:
        found = {ALL: (summary["eval_accuracy"], count), **found}
    rows = []
    for name, (accuracy, preferences) in found.items():
        low, high = wilson_interval(round(accuracy * preferences), preferences)
        interval = f"{low:.4f} - {high:.4f}"
        rows.append({"source": name, "preferences": preferences, "accuracy": accuracy, "interval": interval})
    return rows


def _ratings(summary: dict[str, Any]) -> str:
    """Return the agreement with ratings in words, if the last evaluation is of the exported step; else empty."""
    if "eval_mse" not in summary or summary.get("exported_step", summary.get("steps")) != summary.get("steps"):
        return ""
    return ", ".join(f"{text} {shown(summary[f'eval_{name}'])}" for name, text in FIGURES.items())


def _recipe(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    optim, model = config.optim, config.model
    adapters = {} if model.lora is None else {"adapters": _listed(model.lora.model_dump(exclude_none=True))}
    return {
        "loss": _listed({"kind": "bradley_terry", **config.loss.model_dump()}),
        **({} if config.paradigm == "judge" else {"head": _listed(model.head.stored())}),
        **adapters,
        "frozen": ", ".join(model.freeze) or "nothing",
        "steps": summary.get("exported_step", summary.get("steps", UNKNOWN)),
        "preferences trained on": summary.get("preferences", UNKNOWN),
        "texts a step" if config.paradigm == "judge" else "preferences a step": optim.batch_pairs,
        "learning rate": f"{optim.lr:g}, {optim.schedule}, warm-up {optim.warmup_ratio:g}",
        "precision": config.precision.dtype,
        "seed": config.run.seed,
    }


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
