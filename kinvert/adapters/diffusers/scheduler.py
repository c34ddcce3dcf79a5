"""A scheduler of diffusers that runs any sampler of kinvert, in pipelines as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

import kinvert as ki
from kinvert.adapters.diffusers.course import Course, check_sampler, course_for, saved_options
from kinvert.adapters.diffusers.host import SHARED, ConfigMixin, SchedulerMixin, built, class_name, first_noise
from kinvert.adapters.diffusers.own import draws_every_step, on_levels, own_path, own_rule, uses_pair
from kinvert.adapters.diffusers.predictions import read_prediction
from kinvert.adapters.diffusers.running import Generators, PipelineRun, SchedulerOutput, is_entry, number_of
from kinvert.adapters.diffusers.start import Start
from kinvert.adapters.diffusers.timetable import KNOWN, check_known, read_timetable
from kinvert.rules import Rule

__all__ = ["KinvertScheduler"]

SAVED = "kinvert"
"""The key of the config that says how this scheduler was made; the others are those of the user's scheduler."""


class KinvertScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs any sampler of kinvert.

        pipe.scheduler = KinvertScheduler.from_scheduler(pipe.scheduler, "dpmpp_3m")
        image = pipe(prompt).images[0]

    Noise levels and timesteps are those of the user's scheduler, as it makes them. Latents are what they are with that
    scheduler, before a step and after it. A sampler of several evaluations a step repeats timesteps: `order` is the
    number of evaluations of most steps.

    With `inverse=True` the run goes from the image to the noise, `pipe(latents=encoded)`, and the latents that come out
    go into `pipe(latents=...)` with the scheduler `back()`.

    Attributes:
        timesteps: the time of each evaluation.
        sigmas: the level of each evaluation, and the last level.
        schedule: the levels of the run, as `ki.sample` and its like take them; flow times for flow models.
        num_inference_steps: the number of steps.
    """

    def __init__(
        self, scheduler: Any, sampler: str | Rule | None = None, inverse: bool = False, **options: Any
    ) -> None:
        if isinstance(scheduler, KinvertScheduler):
            scheduler = scheduler._base
        check_known(scheduler)
        self._base: Any = copy.deepcopy(scheduler)
        self._prediction = read_prediction(scheduler)
        self._own = sampler is None
        if sampler is None:
            if options:
                raise TypeError(f"options {', '.join(options)} were given without a sampler; name one")
            self._rule = own_rule(scheduler)
        else:
            self._rule = ki.sampler(sampler, **options)
        check_sampler(self._rule, self._pair)
        self._inverse = bool(inverse) or KNOWN[class_name(scheduler)][1].startswith("rising")
        self._above_zero = False
        self._start = Start()
        self._course: Course | None = None
        self._run: PipelineRun | None = None
        self._first = 0  # the evaluation that the run began with
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor = scheduler.timesteps
        self._register()

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, sampler: str | Rule | None = None, inverse: bool = False, **options: Any
    ) -> Self:
        """Make a scheduler that runs a sampler on the noise levels of another.

        Args:
            scheduler: the scheduler of the pipeline, as an object; it is copied. Its options say what the network
                predicts, how the levels are spaced, and how the denoised image is clipped.
            sampler: a name of `ki.SAMPLERS`, or a rule; for flow models the rule that `ki.flow_sampler` makes of it.
                None takes the rule that equals the scheduler's own method.
            inverse: run upwards, from the image to the noise; a last level of 0 becomes a small one. diffusers' own
                inverse schedulers always do.
            **options: options of the sampler, e.g. `eta`.

        Raises:
            TypeError: a class whose levels are not known, or no scheduler; options without a sampler.
            ValueError: a sampler that a pipeline cannot run, an own method that no sampler equals, a prediction type
                that has no meaning.
        """
        return cls(scheduler, sampler, inverse, **options)

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build a saved scheduler again; `from_pretrained` calls it.

        Raises:
            ValueError: a config of another class, or of a scheduler with tensors, which are not in its config.
        """
        how = None if config is None else dict(config).get(SAVED)
        if how is None:
            raise ValueError(
                "config: it is none of a KinvertScheduler; use KinvertScheduler.from_scheduler(pipe.scheduler, "
                "'dpmpp_2m'), with the scheduler itself"
            )
        start = kwargs.pop("start", Start())
        start.check(how.get("tensors", []))
        rest = {name: value for name, value in dict(config).items() if name != SAVED and not name.startswith("_")}
        made = cls(built(how["scheduler"], rest | kwargs), how["sampler"], how["inverse"], **how["options"])
        made._inverse, made._above_zero, made._start = how["inverse"], how["above_zero"], start
        made._register()
        return (made, {}) if return_unused_kwargs else made

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, *args: Any, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Load a scheduler that `save_pretrained` wrote; one with a state only from a folder of this machine."""
        start = Start.read(pretrained_model_name_or_path or "", subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, *args, start=start, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config, and the tensors of `begin_with` and `back` in a file beside it.

        Raises:
            ValueError: a rule that is not made by a name of `ki.SAMPLERS` and plain options.
        """
        if self.config[SAVED]["options"] is None:
            raise ValueError(
                f"sampler: {self._rule!r} cannot be saved, because no name of ki.SAMPLERS with plain options makes it"
            )
        self._start.write(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the levels of a run, by the user's scheduler, and the timesteps of its evaluations.

        Args:
            num_inference_steps: the number of steps.
            device: of `timesteps`.
            timesteps, sigmas, mu, **kwargs: handed to the user's scheduler if they are given.

        Raises:
            TypeError: an argument that the user's scheduler does not take.
            ValueError: levels or a sampler that make no run.
        """
        kwargs |= {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, "num_inference_steps": num_inference_steps}
        given = {name: value for name, value in kwargs.items() if value is not None}
        try:
            self._base.set_timesteps(**given)
        except TypeError as error:
            raise TypeError(f"{class_name(self._base)} does not take {', '.join(given)}: {error}") from error
        self._compile()
        self.num_inference_steps = len(self._course_now().plan.steps)
        times = self._course_now().timesteps
        whole = self._course_now().table.integral and all(t.is_integer() for t in times)
        self.timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32, device=device)
        self._run, self._begin_index, self._first = None, None, 0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the input of the network: scaled for states in VE coordinates, else the sample as it is."""
        course = self._course_now()
        if course.table.space != "ve":
            return sample
        k = self._expected(timestep)
        scale = self._prediction.c_in(course.levels[k])
        if k == 0 and self._start.state is None:
            scale *= course.first_scale
        return sample * scale

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Take what the network returned for one evaluation, and return the latents of the next.

        Args:
            model_output: the network's output, of sample's shape.
            timestep: of the evaluation, as in `timesteps`.
            sample: the latents that the pipeline holds.
            eta: must be 0; it is an option of the sampler here.
            use_clipped_model_output: must not be true; the sampler 'euler' is what it asks for.
            generator: of the noise of stochastic samplers, one or one for each sample.
            return_dict: return a `SchedulerOutput`, not a tuple.

        Raises:
            ValueError: a timestep out of its order; tensors of another shape; latents that were changed where the
                sampler cannot take that up.
        """
        if eta:
            raise ValueError(
                f"eta={eta:g}: give it to the sampler, from_scheduler(scheduler, 'euler_ancestral', eta={eta:g})"
            )
        if use_clipped_model_output:
            raise ValueError("use_clipped_model_output: leave it out, and use from_scheduler(scheduler, 'euler')")
        course, k = self._course_now(), self._expected(timestep)
        if self._run is None:
            self._first = k
            self._run = PipelineRun(
                course,
                self._prediction,
                pair=self._pair,
                step=course.starts[k],
                sample=sample,
                state=self._start.state,
                noises=self._start.noises,
                generator=generator,
                every_step=self._own and draws_every_step(self._base),
                path=own_path(self._base) if self._own else None,
                unit=first_noise(self._base) if self._inverse else 1.0,
            )
        latents, denoised = self._run.receive(model_output, sample, generator)
        return SchedulerOutput(latents, denoised) if return_dict else (latents, denoised)

    def begin_with(self, found: ki.Inversion) -> tuple[Tensor, KinvertScheduler]:
        """Return the latents and the scheduler with which a pipeline makes the image of an inversion.

        Auxiliary state and noises of the inversion are in the scheduler. Call it after `set_timesteps`.

        Args:
            found: an inversion of this scheduler's sampler on its `schedule`, or on `schedule[:-1]`.

        Returns:
            The latents for `pipe(latents=...)`, and the scheduler for `pipe.scheduler`.

        Raises:
            ValueError: an inversion on other levels, or one that has embeddings, which a pipeline cannot take up.
        """
        above = self._course_now().fits(found)
        return self._started({"x": found.latent, **found.memory}, found.noises, above)

    def back(self) -> KinvertScheduler:
        """Return the scheduler that takes the latents of a finished inverse run to the image again.

        For algebraically reversible samplers it holds the auxiliary state, so that the image comes back to rounding,
        and it ends at the last positive level, where the inverse run began. For all others it is the sampler's plain
        run.

        Raises:
            RuntimeError: this scheduler does not run upwards, or its run is not finished.
        """
        if not self._inverse:
            raise RuntimeError("back() belongs to a scheduler that runs upwards; make one with inverse=True")
        run, course = self._run, self._course_now()
        if run is None or not run.run.done:
            raise RuntimeError("the run upwards is not finished; call the pipeline with this scheduler first")
        there = copy.deepcopy(self)
        there._inverse = False
        if course.down is None:
            there._run = None
            there._register()
            there._compile()
            return there
        return there._started(run.values, (), course.down.sigmas[-1] != course.table.levels[-1])[1]

    def _started(
        self, state: Mapping[str, Tensor], noises: Sequence[Tensor], above_zero: bool
    ) -> tuple[Tensor, KinvertScheduler]:
        """Return the latents of a state at the noisiest level, and the scheduler of the run that begins with it."""
        there = copy.deepcopy(self)
        there._inverse, there._above_zero, there._run = False, above_zero, None
        there._start = Start(dict(state) if len(state) > 1 else None, tuple(noises))
        there._register()
        there._compile()
        course = there._course_now()
        x, level = state["x"], course.plan.sigmas[0]
        if there._start.state is not None:
            x, level = ki.stepwise(course.plan, dict(state)).x, course.levels[0]
        return x / course.table.to_x(level) / first_noise(there._base), there

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at an evaluation of `timesteps`, as image-to-image pipelines do.

        Raises:
            ValueError: the evaluation is in the middle of a step, or the run begins with a state of its own.
        """
        self._course_now().check_begin(int(begin_index))
        self._begin_index = int(begin_index)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Any = None) -> int:
        """Return the number of the evaluation that begins a step at a timestep."""
        return self._course_now().begin_at(number_of(timestep))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents at timesteps, in the space of the user's scheduler.

        During a run with a begin index this is the level of the next evaluation, else that of each timestep.
        """
        course = self._course
        if course is None:
            made: Tensor = self._base.add_noise(original_samples, noise, timesteps)
            return made
        if self._begin_index is None and self._run is None:
            levels = [course.levels[self.index_for_timestep(t)] for t in timesteps.reshape(-1)]
        else:
            k = self._begin_index or 0 if self._run is None else self._first + self._run.run.evaluations
            levels = [[*course.levels, course.plan.sigmas[-1]][k]] * timesteps.numel()
        return course.table.noisy(original_samples, noise, levels)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Return `add_noise(sample, noise, timestep)`, the name that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    @property
    def schedule(self) -> Tensor:
        """The levels of the run, in its direction, float64."""
        return self._course_now().schedule

    @property
    def sampler(self) -> Rule:
        """The rule that runs, in the coordinates of the levels."""
        return self._course_now().plan.rule

    @property
    def sigmas(self) -> Tensor:
        """The level of each evaluation and the last level, float32, on the CPU."""
        course = self._course_now()
        return torch.tensor([*course.levels, course.plan.sigmas[-1]], device="cpu")

    @property
    def order(self) -> int:
        """The number of evaluations of most steps."""
        return 1 if self._course is None else self._course.order

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies its latents by: that of the user's scheduler, or 1 for a run upwards."""
        return 1.0 if self._inverse else first_noise(self._base)

    @property
    def step_index(self) -> int | None:
        """The number of the next evaluation; None before a run."""
        return None if self._run is None else self._first + self._run.run.evaluations

    @property
    def begin_index(self) -> int | None:
        """The number of the first evaluation, if it was set."""
        return self._begin_index

    @property
    def _pair(self) -> bool:
        """Whether the sampler gets the clipped image and the image as it came."""
        return self._own and uses_pair(self._base)

    def _course_now(self) -> Course:
        """Return the compiled run, or raise RuntimeError before `set_timesteps`."""
        if self._course is None:
            raise RuntimeError("the scheduler has no levels yet; call set_timesteps(num_inference_steps) first")
        return self._course

    def _compile(self) -> None:
        """Compile the sampler for the levels that the user's scheduler has now."""
        table = read_timetable(self._base)
        rule = on_levels(self._rule, self._base, table) if self._own else self._rule
        self._course = course_for(
            rule,
            table,
            up=self._inverse,
            above_zero=self._above_zero,
            started=self._start.state is not None,
            own=self._own,
        )

    def _expected(self, timestep: Any) -> int:
        """Return the number of the evaluation that a pipeline makes now.

        Raises:
            ValueError: the timestep is not that of the evaluation; nothing is left to evaluate.
        """
        course = self._course_now()
        if self._run is None:
            k = self._begin_index
            if k is None:
                k = 0 if timestep is None else self.index_for_timestep(timestep)
        else:
            k = self._first + self._run.run.evaluations
        if k >= len(course.levels):
            raise ValueError("timestep: the run is over; call set_timesteps before the next one")
        if timestep is None or is_entry(timestep, self.timesteps, k):
            return k
        given, wanted = number_of(timestep), course.timesteps[k]
        if not math.isclose(given, wanted, rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(
                f"timestep: evaluation {k} of {len(course.levels)} is at {wanted:g}, got {given:g}; a pipeline has to "
                "go through scheduler.timesteps in order, without repeating or leaving out any"
            )
        return k

    def _register(self) -> None:
        """Write the config: that of the user's scheduler, and how this one was made of it."""
        how = {
            "scheduler": class_name(self._base),
            "sampler": None if self._own else self._rule.name,
            "options": {} if self._own else saved_options(self._rule),
            "inverse": self._inverse,
            "above_zero": self._above_zero,
            "tensors": [*self._start.tensors],
        }
        kept = {name: value for name, value in self._base.config.items() if not name.startswith("_") and name != SAVED}
        self.register_to_config(**kept, **{SAVED: how})

    def __getattr__(self, name: str) -> Any:
        if name in SHARED and "_base" in self.__dict__:
            return getattr(self._base, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
