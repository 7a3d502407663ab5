"""FSDP over processes on CPUs, which accelerate replaces by DDP without a word: for tests alone."""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from slas_trl.trainer import SLASTrainer


class _ShardedOnCPUs(AcceleratorState):
    # A property without a setter: accelerate overwrites the attribute from `PartialState`, whose barriers stay gloo's.
    distributed_type = property(lambda self: DistributedType.FSDP, lambda self, value: None)


def shard_on_cpus() -> None:
    """From now on, trainers shard if accelerate's environment asks for it."""
    create = SLASTrainer.create_accelerator_and_postprocess

    def create_sharded(trainer: SLASTrainer) -> None:
        create(trainer)
        state = trainer.accelerator.state
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the environment
            state.__class__ = _ShardedOnCPUs
            trainer.is_fsdp_enabled = True

    SLASTrainer.create_accelerator_and_postprocess = create_sharded  # type: ignore[method-assign]
