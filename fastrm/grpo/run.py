"""A run of `fastrm grpo`: evaluate, train with TRL's GRPOTrainer, evaluate again, report."""

import functools
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from fastrm.errors import ConfigError, DataError, DivergedError, InterruptedRun, StorageError
from fastrm.grpo.config import GrpoConfig, QuestionsSection
from fastrm.grpo.evaluation import evaluate_judge, evaluate_policy
from fastrm.grpo.policy import fit, is_visual, load_policy, save_policy
from fastrm.grpo.preferences import read_comparisons, read_lessons
from fastrm.grpo.questions import Question, as_dataset, read_questions
from fastrm.grpo.report import make_report, show_report
from fastrm.grpo.rewarding import RewardFunction
from fastrm.json_files import to_json
from fastrm.prompts.spec import JudgeSpec
from fastrm.rl.judging import JudgeReward
from fastrm.rl.rewards import Rewards, is_url, open_scorer
from fastrm.ui import Display


def run_grpo(config: GrpoConfig) -> dict:
    """Run what a configuration says; write metrics.jsonl, report.json, report.png and policy/, and return the report.

    Of several processes all measure, a share each, and the first one writes; the report of the others is empty.

    Raises:
        ConfigError: if TRL is missing, run.dir holds a run, or something named cannot be used.
        DataError: for questions that cannot be used, or a step whose rollouts all have no reward.
        ServerError: if a reward server is away or refuses.
        StorageError: if run.dir cannot be written.
        DivergedError: if the policy's loss is not finite.
        InterruptedRun: if it was stopped while the policy was trained.
    """
    _check_installed(config)
    process = _process(config)
    folder = _new_folder(config.run.dir)
    left_out = Counter()
    train, held_out, taught = _read_questions(config, left_out)
    spec = _spec(config.data.eval)
    scorers = _open_scorers(config, process.device)
    functions = [RewardFunction(one, number, scorers.get(one.model), spec) for number, one in enumerate(config.rewards)]
    policy, processor = load_policy(config.policy, [*taught, *train], config.run.seed)
    policy.to(process.device)
    _check_images((*taught, *train, *held_out), processor)
    _check_length(policy, config.rollouts.max_tokens)
    with Display(silent=not process.is_main_process) as display:

        def measure(what: str) -> dict:
            answers, limit = config.rewards[0].answers, config.rollouts.max_tokens
            if spec is not None:
                found = evaluate_judge(policy, processor, held_out, limit, JudgeReward(spec), process)
            else:
                judge = None if config.judge is None else Rewards(scorers[config.judge])
                found = evaluate_policy(policy, processor, held_out, limit, answers, judge, process)
            display.say(f"{what}: accuracy {found['accuracy']:.4f} on {found['questions']:,} questions")
            return found

        if config.policy.fit is not None:
            update, steps = display.task("supervised steps"), config.policy.fit.steps
            fit(policy, processor, taught, config.policy.fit, config.run.seed, lambda done: update(done, steps))
        before = measure("before")
        spent = timed_calls(policy, "generate")
        started = time.monotonic()
        try:
            rows = train_policy(config, policy, processor, train, functions, display, folder)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"stopped before the policy was saved; {folder} holds the metrics of its steps. A run of grpo cannot "
                "go on: begin another in a new run.dir"
            ) from None
        seconds = time.monotonic() - started
        del policy.generate  # the class's again
        generation = None if config.rollouts.backend == "vllm" else sum(spent)
        after = measure("after")
    if not process.is_main_process:
        return {}
    save_policy(policy, processor, folder / "policy")
    report = make_report(config, before, after, rows, seconds, generation, folder, dict(+left_out))
    show_report(report)
    return report


def _read_questions(config: GrpoConfig, left_out: Counter) -> tuple[list[Question], list[Question], list[Question]]:
    """Return the questions of training, those that are held out, and those of the policy's supervised start.

    Args:
        left_out: as that of `read_comparisons`.
    """

    def read(source: QuestionsSection, order: str) -> list[Question]:
        spec = _spec(source)
        if spec is None:
            return read_questions(source)
        return read_comparisons(source, spec, order=order, seed=config.run.seed, left_out=left_out)

    train, held_out = read(config.data.train, "random"), read(config.data.eval, "both")
    if len(train) < config.optim.batch_prompts:
        raise ConfigError(
            f"{config.data.train.path}: has {len(train):,} questions, fewer than the {config.optim.batch_prompts:,} of "
            "a step, so that there is none; lower optim.batch_prompts"
        )
    if config.policy.fit is None:
        return train, held_out, []
    source = config.policy.fit.data
    spec = _spec(source)
    taught = read_questions(source) if spec is None else read_lessons(source, spec, seed=config.run.seed)
    return train, held_out, taught


def _spec(source: QuestionsSection) -> JudgeSpec | None:
    """Return the judge that a source's preferences are shown to; None: its rows are questions.

    Raises:
        ConfigError: as `JudgeReward`.
    """
    return None if source.spec is None else JudgeReward(source.spec).spec


def _check_length(policy, max_tokens: int) -> None:
    """Raise ConfigError if the longest rollout fills the policy's positions, so that none are left for a prompt."""
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_tokens >= positions:
        raise ConfigError(
            f"rollouts.max_tokens: {max_tokens:,}, but the policy has {positions:,} positions "
            "(max_position_embeddings), for the prompt and its answer; lower it"
        )


def _check_images(questions: Iterable[Question], processor) -> None:
    seen = next((question for question in questions if question.images), None)
    if seen is not None and not is_visual(processor):
        raise ConfigError(f"policy: a text model, but {seen.origin} has an image; name a policy that reads images")


def timed_calls(owner: object, name: str) -> list[float]:
    """Return a list that takes the seconds of every call of an object's method from now on, until `del owner.name`."""
    spent: list[float] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def timed(*arguments, **named):
        started = time.monotonic()
        try:
            return method(*arguments, **named)
        finally:
            spent.append(time.monotonic() - started)

    setattr(owner, name, timed)
    return spent


def _process(config: GrpoConfig):
    """Return accelerate's state of this process: one of several under its launcher, alone otherwise."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=config.run.device == "cpu" or not torch.cuda.is_available())


def _open_scorers(config: GrpoConfig, device) -> dict[str, object]:
    """Return what scores, by its URL or folder; a folder that is named twice is loaded once."""
    device = "cpu" if device.type == "cpu" else str(device)  # accelerate numbers CPUs too
    names = {config.judge, *(one.model for one in config.rewards)} - {None}
    return {name: open_scorer(name, **({} if is_url(name) else {"device": device})) for name in sorted(names)}


def train_policy(
    config: GrpoConfig,
    policy,
    processor,
    questions: list[Question],
    functions: list[RewardFunction],
    display: Display,
    folder: Path,
) -> list[dict]:
    """Train a policy in place; return the rows of metrics.jsonl, one for each step.

    Raises:
        as `run_grpo`.
    """
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    rows: list[dict] = []
    update = display.task("GRPO")

    class Metrics(TrainerCallback):
        def on_log(self, arguments, state, control, logs=None, **_):
            if not state.is_world_process_zero or "reward" not in (logs or {}):
                return
            if logs["reward"] is None:
                failed = sum((function.num_failed for function in functions), Counter())
                reasons = ", ".join(f"{code} {number:,}" for code, number in failed.most_common())
                raise DataError(f"step {state.global_step}: no rollout has a reward ({reasons}); see docs/rl.md")
            rows.append({"step": state.global_step, **logs})
            with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(to_json(rows[-1]) + "\n")
            update(state.global_step, state.max_steps, f"reward {logs['reward']:.3f}")
            if not _is_finite(logs.get("loss", 0.0)) or not _is_finite(logs.get("grad_norm", 0.0)):
                raise DivergedError(f"step {state.global_step}: the loss is {logs['loss']}; lower optim.lr")

    trainer = GRPOTrainer(
        model=policy, args=trl_arguments(config, folder), train_dataset=as_dataset(questions),
        processing_class=processor, reward_funcs=functions, callbacks=[Metrics()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return rows


def trl_arguments(config: GrpoConfig, folder: Path):
    """Return TRL's arguments for a configuration.

    Raises:
        ConfigError: if the processes do not divide a step.
    """
    from trl import GRPOConfig

    optim, rollouts, process = config.optim, config.rollouts, _process(config)
    processes, on_cpu = process.num_processes, process.device.type == "cpu"
    parts, rest = divmod(optim.batch_prompts * rollouts.num, optim.micro_batch * processes)
    if rest or not parts:
        raise ConfigError(
            f"optim.micro_batch {optim.micro_batch} on {processes} processes does not divide the "
            f"{optim.batch_prompts * rollouts.num} rollouts of a step; change it or optim.batch_prompts"
        )
    length = {"max_steps": config.run.max_steps} if config.run.max_steps else {"num_train_epochs": config.run.epochs}
    schedules = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    return GRPOConfig(
        output_dir=str(folder / "trl"), seed=config.run.seed, use_cpu=on_cpu, bf16=optim.precision == "bf16",
        gradient_checkpointing=not on_cpu, per_device_train_batch_size=optim.micro_batch,
        gradient_accumulation_steps=parts, num_generations=rollouts.num, max_completion_length=rollouts.max_tokens,
        temperature=rollouts.temperature, use_vllm=rollouts.backend == "vllm", vllm_mode="colocate",
        learning_rate=optim.lr, lr_scheduler_type=schedules[optim.schedule], warmup_steps=optim.warmup_steps,
        max_grad_norm=optim.max_grad_norm, beta=optim.kl, reward_weights=[one.weight for one in config.rewards],
        logging_steps=1, logging_nan_inf_filter=False, report_to="none", save_strategy="no", disable_tqdm=True,
        **length,
    )  # fmt: skip


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _new_folder(name: str) -> Path:
    """Make the folder of a run.

    Raises:
        ConfigError: if it holds a run.
        StorageError: if it cannot be made.
    """
    folder = Path(name)
    if found := next((one for one in ("report.json", "metrics.jsonl") if (folder / one).exists()), None):
        raise ConfigError(f"{folder}: holds a run already ({found}); set run.dir to start another, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"run.dir {folder}: cannot be made: {error.strerror}; choose another run.dir") from None
    if not os.access(folder, os.W_OK):
        raise StorageError(f"run.dir {folder}: cannot be written: Permission denied; choose another run.dir")
    return folder


def _check_installed(config: GrpoConfig) -> None:
    """Refuse a run without what it needs, and leave out what transformers says to those who call it."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(f'fastrm grpo needs TRL: {error}; pip install "fastrm[grpo]"') from error
    if config.rollouts.backend == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            'rollouts.backend: got vllm, which is not installed; pip install "trl[vllm]", or take transformers'
        )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the files that are written
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
