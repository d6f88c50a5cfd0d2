"""The settings of `fastrm grpo`: one YAML file plus `a.b=c` overrides, which `load_run` reads as those of `train`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastrm.config import TrainedTokenizer
from fastrm.sections import NonEmpty, Positive, Section

PositiveFloat = Annotated[float, Field(gt=0.0)]


class RunSection(Section):
    """The run: its folder, length and seed."""

    dir: NonEmpty | None = None
    """The folder of the run: metrics, report, policy. Default: runs/<name of the YAML file>."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of initial weights, of the order of the questions, and of the rollouts."""
    epochs: Positive = 1
    """Passes over the questions; ignored if max_steps is set."""
    max_steps: Positive | None = None
    """Optimizer steps of the whole run."""
    device: Literal["auto", "cpu"] = "auto"
    """The device: auto (all GPUs that the launcher gives, else the CPU), or cpu."""


class QuestionsSection(Section):
    """Questions with true answers."""

    path: NonEmpty
    """A .jsonl, .json or .parquet file with a prompt (prompt, question or messages), images, and the true answer; or
    digits:train / digits:eval."""
    images: str | None = None
    """The folder that paths of images are relative to. Default: the file's."""
    truth: str = "solution"
    """The column of the true answers."""
    spec: NonEmpty | None = None
    """A pairwise judge, by the name of a shipped SPEC or the path of one (docs/judges.md), whose prompt asks about
    preferences: the rows are preferences in any known layout, and the true answer is the place of the better response,
    1 or 2. Default: none, the rows are questions."""
    order: Literal["random", "both"] | None = None
    """The order in which the judge of `spec` is shown two responses: random, by the seed and the texts, or both, one
    question each. Default: both in data.eval, else random."""
    rows: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """The first row, counted from 0, and the row after the last. Default: all."""

    @model_validator(mode="after")
    def _check(self):
        if self.spec is None and self.order is not None:
            raise ValueError("order: belongs to spec, the judge that is shown two responses; set spec, or leave it out")
        if self.spec is not None and "truth" in self.model_fields_set:
            raise ValueError("truth: with spec the true answers are made of the rows' preferences; leave it out")
        return self


class DataSection(Section):
    """The questions that the policy learns from, and those that it is measured on."""

    train: QuestionsSection
    """The questions that rollouts answer."""
    eval: QuestionsSection
    """The questions of the evaluation before and after."""

    @model_validator(mode="after")
    def _check(self):
        if self.train.spec != self.eval.spec:
            raise ValueError(
                f"data.eval.spec: got {self.eval.spec}, and data.train.spec is {self.train.spec}; set the same"
            )
        return self


class FitSection(Section):
    """Supervised steps on true answers, before the first evaluation."""

    data: QuestionsSection
    """The questions that are answered."""
    steps: Positive
    """Optimizer steps."""
    batch: Positive = 32
    """Questions of one step."""
    lr: PositiveFloat = 1e-3
    """The learning rate of AdamW, constant."""


class PolicySection(Section):
    """The model that learns."""

    path: NonEmpty | None = None
    """The folder or hub id of a policy."""
    init: dict[str, Any] | None = None
    """A transformers config (with model_type) to initialise at random instead of `path`."""
    tokenizer: TrainedTokenizer | None = None
    """The tokenizer of a policy of `init`: {train_vocab_size: n}, trained on the questions."""
    min_pixels: Positive | None = None
    """Images are enlarged to this many pixels. Default: the processor's setting."""
    max_pixels: Positive | None = None
    """Images are reduced to this many pixels. Default: the processor's setting."""
    fit: FitSection | None = None
    """Supervised steps before; default: none."""

    @model_validator(mode="after")
    def _check(self):
        if (self.path is None) == (self.init is None):
            raise ValueError("set exactly one of policy.path and policy.init")
        if self.init is not None and not isinstance(self.init.get("model_type"), str):
            raise ValueError("policy.init needs model_type, for example qwen2_5_vl or qwen2")
        if (self.init is None) != (self.tokenizer is None):
            raise ValueError("policy.tokenizer {train_vocab_size: n} belongs to policy.init, and only there")
        return self


class JudgePartsSection(Section):
    """The weights of the parts of a judge's reward: format F + A (accuracy + consistency C), as docs/rl.md says.

    The defaults are R1-Reward's. LLaVA-Critic-R1's are format 0.1, accuracy 0.9, consistency 0.
    """

    format: float = 0.5
    """The reward of a text in exactly the form of the SPEC's parser."""
    accuracy: float = 1.0
    """The reward of a verdict that names the better response."""
    consistency: float = 0.5
    """The number that is added to accuracy where the thinking ends for the response of the verdict, and subtracted
    where it ends for the other."""


class RewardSection(Section):
    """One reward; the weighted sum of all is what the policy learns from."""

    scheme: Literal["rule", "model", "hybrid", "judge"]
    """rule: 1 if the answer is right, else 0; model: the model's reward r; hybrid: 1 if right, else sigmoid(r); judge:
    for the text of a judge, whose SPEC is data.train.spec, and which no other scheme can read."""
    parts: JudgePartsSection | None = None
    """The weights of the parts of the scheme judge. Default: R1-Reward's."""
    model: NonEmpty | None = None
    """The URL of a `fastrm serve`, or the folder of a reward model, which is loaded into this process."""
    answers: Literal["auto", "text", "choice", "math"] = "auto"
    """The way to compare answers (docs/rl.md)."""
    weight: float = 1.0
    """The factor of this reward in the sum."""

    @model_validator(mode="after")
    def _check(self):
        if self.parts is not None and self.scheme != "judge":
            raise ValueError(f"parts: belong to the scheme judge; leave them out with {self.scheme}")
        if self.answers != "auto" and self.scheme == "judge":
            raise ValueError("answers: a judge's verdict is read by its SPEC's parser; leave it out with judge")
        if (self.model is None) != (self.scheme in ("rule", "judge")):
            raise ValueError(f"scheme {self.scheme}: {'leave out' if self.model else 'name'} its model")
        return self


class RolloutSection(Section):
    """The rollouts of a question."""

    num: Annotated[int, Field(ge=2)] = 8
    """Rollouts of one question; their rewards are compared with each other."""
    max_tokens: Positive = 1024
    """The longest rollout in tokens."""
    temperature: PositiveFloat = 1.0
    """The temperature of sampling."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """The generator: transformers, or vLLM in the trainer's processes (TRL's extra vllm)."""


class OptimSection(Section):
    """The updates of the policy."""

    lr: PositiveFloat = 1e-6
    """The learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The course of the learning rate after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises."""
    batch_prompts: Positive = 32
    """Questions of one step, over all processes."""
    micro_batch: Positive = 8
    """Rollouts of one backward pass of a process."""
    kl: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the KL divergence from the first policy (beta); 0 keeps no copy of it. TRL loads that copy from
    policy.path, so that it needs one, and no policy.fit."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """The precision of products; weights and optimizer are those of transformers' Trainer."""


class GrpoConfig(Section):
    """The settings of a run."""

    run: RunSection = RunSection()
    """The run."""
    policy: PolicySection
    """The policy."""
    data: DataSection
    """The questions."""
    rewards: Annotated[list[RewardSection], Field(min_length=1)]
    """The rewards."""
    judge: NonEmpty | None = None
    """A reward model, by URL or folder, that measures the policy before and after; it need not be one of the rewards.
    A policy that its reward likes better and that is right less often has learned to please it."""
    rollouts: RolloutSection = RolloutSection()
    """The rollouts."""
    optim: OptimSection = OptimSection()
    """The updates."""

    @model_validator(mode="after")
    def _check(self):
        if all(one.weight == 0.0 for one in self.rewards):
            raise ValueError("rewards: all have weight 0, so that nothing would be learned; leave the weight out for 1")
        if self.data.train.spec is None and any(one.scheme == "judge" for one in self.rewards):
            raise ValueError("rewards: the scheme judge needs data.train.spec and data.eval.spec, the judge's SPEC")
        other = next((one.scheme for one in self.rewards if one.scheme != "judge"), None)
        if self.data.train.spec is not None and other is not None:
            raise ValueError(
                f"rewards: the scheme {other} reads a text as an answer, not the verdict of data.*.spec; set scheme: "
                "judge, or leave spec out"
            )
        if self.data.train.spec is not None and self.judge is not None:
            raise ValueError("judge: a reward model measures answers, not the verdicts of data.*.spec; leave it out")
        fit = self.policy.fit
        if fit is not None and fit.data.spec != self.data.train.spec:
            raise ValueError(
                f"policy.fit.data.spec: got {fit.data.spec}, and data.train.spec is {self.data.train.spec}; set the "
                "same"
            )
        step = self.optim.batch_prompts * self.rollouts.num
        if step % self.optim.micro_batch:
            raise ValueError(
                f"optim.micro_batch {self.optim.micro_batch} does not divide the {step} rollouts of a step "
                "(optim.batch_prompts * rollouts.num)"
            )
        if self.optim.kl and (self.policy.path is None or self.policy.fit is not None):
            raise ValueError("optim.kl needs policy.path without policy.fit: TRL loads the first policy from there")
        return self
