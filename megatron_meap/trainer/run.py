"""The interface to Megatron's trainer: the model's configuration, the forward step, the loss and its report."""

import atexit
import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer, global_vars, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch.distributed.checkpoint.api import CheckpointException

from megatron_meap.backend import description, device, left_out, megatron_patches, optimizer_step
from megatron_meap.backend.sparing import Sparing
from megatron_meap.checkpoint import integrity, latest
from megatron_meap.checkpoint.copies import Copies
from megatron_meap.cluster import connections
from megatron_meap.cluster.run_files import STOP, Heartbeat, Requests
from megatron_meap.cluster.signals import EXIT_STOPPED, StopRequest
from megatron_meap.errors import UsageError, causes, note_status, one_line
from megatron_meap.files import is_disk_full
from megatron_meap.meap.dataset import COPY, NOISED
from megatron_meap.meap.losses import BITS_PER_BYTE, bits_per_byte, next_token_loss
from megatron_meap.tokenization.mask_token import special_token_ids
from megatron_meap.tokenization.text_bytes import text_bytes
from megatron_meap.trainer import bad_steps, carried, data_use, log_line, preflight, refusals, wandb_run
from megatron_meap.trainer.arguments import parse_arguments
from megatron_meap.trainer.batches import datasets_provider, get_batch
from megatron_meap.trainer.log_line import LogLine
from megatron_meap.trainer.model import embedding_ranks, model_config
from megatron_meap.trainer.output import LOG, Output
from megatron_meap.trainer.probe import RetrievalProbe

stimer = StragglerDetector()
_HARDLY_ANYTHING = 2**20
"""Bytes: with fewer free a disk counts as full."""


def run(remarks: Callable[[Namespace], list[str]] = lambda args: []) -> None:
    """Pretrain as the command line says; the exit statuses are in docs/training.md.

    `remarks` returns further lines to print before the run starts.
    """
    output = Output().install()
    try:
        _run(output, remarks)
    except Exception as error:
        if isinstance(error, UsageError) or not is_disk_full(error):
            raise
        raise _full_disk(error) from error
    finally:
        output.quiet = False  # to show everything about a failure


def _run(output: Output, remarks: Callable[[Namespace], list[str]]) -> None:
    args, store = prepare()
    output.open_log(args.save, _heading(args) if args.rank == 0 else None)
    wandb_run.begin(args)
    atexit.register(_end_workers)
    stop = StopRequest(Requests(args.save if args.rank == 0 else None)).install()
    global_vars._GLOBAL_SIGNAL_HANDLER = stop
    args.exit_signal_handler = True  # the trainer asks it after every step
    megatron_patches.save_on_request(stop.poll, stop.honoured)
    heartbeat = Heartbeat(args.save) if args.rank == 0 else None
    files = carried.collect(args) if args.rank == 0 and args.save else {}
    megatron_patches.save_checkpoints_by(
        lambda save: integrity.recorded_by_all_ranks(carried.beside(Copies(Sparing(save)), files))
    )
    if args.meap_keep_last is not None:
        megatron_patches.after_each_save(
            partial(latest.prune, Path(args.save), args.meap_keep_last, args.meap_keep_every)
        )
    if args.meap_probe_interval is not None:
        megatron_patches.after_each_step(RetrievalProbe(args, special_token_ids(get_tokenizer())).after_step)
    log = LogLine(args)
    skipped, args.iterations_to_skip = args.iterations_to_skip, []
    left_out.leave_out(skipped)
    megatron_patches.around_log(log.begin, log.see, log.rewrite, skipped)
    if args.rank == 0:
        _announce(args)
        for line in remarks(args):
            print(line, flush=True)
    try:
        with heartbeat.alive() if heartbeat else contextlib.nullcontext():
            _pretrain(args, store, output, heartbeat)
    except SystemExit as end:  # Megatron's own way out of the training loop
        _leave(args, end, stop, output)


def _leave(args: Namespace, end: SystemExit, stop: StopRequest, output: Output) -> NoReturn:
    """Say what has ended the run before its last step, and leave with the status that tells."""
    if isinstance(end.code, int) and end.code in bad_steps.STATUSES:
        bad_steps.end(args, end.code, bad_steps.found_in(end.__cause__))
    if end.code is None and _not_begun(args) and not args.ckpt_convert_format:  # no error, and yet no training
        raise UsageError(f"Megatron ends before the first step: {output.last_of_library}") from end
    if (cause := _cause(args, stop)) is None:
        raise end
    if args.rank == 0:
        output.say(_how_it_stopped(args, cause))
    if stop.stop_asked:
        sys.exit(0)
    note_status(EXIT_STOPPED)
    sys.exit(EXIT_STOPPED)


def _heading(args: Namespace) -> str:
    """What begins this start's part of the log file."""
    return f"=== {datetime.now():%Y-%m-%d %H:%M:%S}, rank 0 of {args.world_size}: {shlex.join(sys.argv)}"


def _announce(args: Namespace) -> None:
    """Print in a few lines what is about to run."""
    print(*description.describe(args), *data_use.lines(args), *log_line.lines(args), sep="\n")
    loads = args.pretrained_checkpoint or (args.load and latest.pointer(Path(args.load)))
    if args.meap_sft and not loads:
        print("warning: no --pretrained-checkpoint: the fine-tuning starts from random weights")
    kept = f"checkpoints and log ({LOG}) in {args.save}" if args.save else "no --save: nothing of this run will be kept"
    if args.ckpt_convert_format:
        kept = f"converts the checkpoint to {args.ckpt_convert_format}, in {args.ckpt_convert_save}, and trains nothing"
    print(kept, flush=True)


def prepare(data_only: bool = False) -> tuple[Namespace, torch.distributed.Store | None]:
    """Parse and check the command line: the arguments, and the store over which the ranks met to do so.

    `data_only` ignores `--save` and `--load`.
    """
    _run_alone_without_launcher()
    megatron_patches.apply()
    if device.is_cpu():
        from megatron_meap.backend import cpu, cpu_patches

        cpu.adapt_megatron()
        cpu_patches.install()
    elif not description.has_fused_optimizer():
        optimizer_step.fuse()
    args = parse_arguments()
    return args, preflight.check(args, data_only)


def _pretrain(
    args: Namespace, store: torch.distributed.Store | None, output: Output, heartbeat: Heartbeat | None
) -> None:
    """Run Megatron's trainer."""

    def step(*inputs: Any, **options: Any) -> Any:
        if heartbeat is not None:
            heartbeat.beat(bad_steps.iteration_of(args))
        result = forward_step(*inputs, **options)
        output.quiet = False
        return result

    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args)),
            datasets_provider,
            ModelType.encoder_or_decoder,
            step,
            get_embedding_ranks=embedding_ranks,
            store=store,
        )
    except UsageError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        if bad_steps.found_in(error) is not None:
            raise SystemExit(bad_steps.REPEATS) from error
        problem = latest.full_disk(Path(args.save), error) if args.save else None
        if problem is None and (lost := connections.explain(error)) is not None:
            if (status := bad_steps.ended_elsewhere()) is not None:
                sys.exit(status)
            raise lost from error
        if problem is None and _not_begun(args):
            refusals.refuse(error, args)
        if problem is None:
            raise
        traceback.print_exc()  # the message below is a conclusion, and the error itself must not be lost
        raise UsageError(f"--save {args.save}: {problem}; free some space and run the same command again") from error


def _full_disk(error: BaseException) -> UsageError:
    """The error for a full disk, other than while a checkpoint was saved; the original one is printed."""
    traceback.print_exception(error)
    args = global_vars._GLOBAL_ARGS
    flags = ("tensorboard-dir", "data-cache-path", "save")
    written = ((flag, getattr(args, flag.replace("-", "_"), None)) for flag in flags)
    there = [(flag, path) for flag, path in written if path and Path(path).exists()]
    full = [f"--{flag} {path}" for flag, path in there if shutil.disk_usage(path).free < _HARDLY_ANYTHING]
    names = [str(name) for each in causes(error) if (name := getattr(each, "filename", None))]
    where = " or ".join(names[:1] or full) or f"a file of this run ({one_line(error)})"
    return UsageError(f"{where}: the disk is full; free some space and run the same command again")


def _not_begun(args: Namespace) -> bool:
    """Whether no step is done yet: a failure until then means that Megatron cannot run with these flags."""
    return getattr(args, "curr_iteration", None) in (None, getattr(args, "iteration", None))


def _end_workers() -> None:
    """Kill the data loader's worker processes: they ignore the SIGTERM by which Python would end them at exit.

    (It is also the signal to stop the job.) Python would wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler treats every end of a worker as a failure
    for child in multiprocessing.active_children():
        child.kill()


def _run_alone_without_launcher() -> None:
    """Let `python pretrain_gpt_meap.py` be a job of one process, as torchrun would start it."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if all(os.environ.get(name, alone[name]) == alone[name] for name in ("RANK", "WORLD_SIZE")):
        os.environ.update(alone | os.environ)


def _cause(args: Namespace, stop: StopRequest) -> str | None:
    """What ended the training before its last step, other than a step given on the command line."""
    if stop.stop_asked:
        return f"the file {Path(args.save) / STOP}"
    if stop.received is not None:
        return signal.Signals(stop.received).name
    step = bad_steps.iteration_of(args) + 1
    if args.exit_duration_in_mins and step < args.train_iters and (not args.exit_interval or step % args.exit_interval):
        return f"--exit-duration-in-mins {args.exit_duration_in_mins}"
    return None


def _how_it_stopped(args: Namespace, cause: str) -> str:
    """What was saved, and how to resume."""
    saved = "nothing saved: no --save"
    if args.save:
        same = args.load and Path(args.load).resolve() == Path(args.save).resolve()
        how = "the same command resumes" if same else f"the same command with --load {args.save} resumes"
        saved = f"checkpoint in {args.save}; {how}"
    return f"stopped by {cause} after iteration {bad_steps.iteration_of(args) + 1}: {saved}"


def forward_step(
    data_iterator: Iterator | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """Megatron's forward step: one micro batch through this rank's part of the model.

    Returns:
        The output (losses [b, s] on the last pipeline stage, activations [s, b, h] before it) and the loss function.
    """
    args = get_args()
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        noised = args.meap_mask_ratio > 0 and (model.training or args.meap_mask_validation)
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage, training=model.training, want_noise=noised)
    packed = _packed_seq_params(batch, args)
    timers("batch-generator").stop()

    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    copies = model.training and args.meap_copy_weight is not None
    evaluated = None if model.training else batch["labels"]
    loss = partial(loss_func, batch["loss_mask"], batch["noise"], copies=copies, evaluated=evaluated)
    with stimer:
        if return_schedule_plan:
            return model.build_schedule_plan(*inputs, **targets), loss
        return model(*inputs, **targets, packed_seq_params=packed), loss


def _packed_seq_params(batch: dict[str, Any], args: Namespace) -> PackedSeqParams | None:
    """Borders of the documents packed into the micro batch, for attention that stays within them."""
    if batch["cu_seqlens"] is None:
        return None
    borders = batch["cu_seqlens"].squeeze(0)
    padded = None if batch["cu_seqlens_padded"] is None else batch["cu_seqlens_padded"].squeeze(0)
    if not device.is_cpu():  # it names a CUDA device by its number; only the TFLOP/s in the log depend on it
        update_seqlen_stats_from_cu_seqlens(borders)
    # A bound: the length of the longest document, `max_seqlen`, would have to be copied from the GPU. The number of
    # tokens in the pack will not do: Megatron's rotary positions would then continue from one document to the next.
    longest = args.seq_length + 1
    local_cp_size = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders if padded is None else padded,
        cu_seqlens_kv=borders if padded is None else padded,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if local_cp_size is None else int(local_cp_size.item()),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=args.seq_length,
    )


def loss_func(
    loss_mask: torch.Tensor,
    noise: torch.Tensor | None,
    output_tensor: torch.Tensor,
    *,
    copies: bool = False,
    evaluated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token loss over all positions, and its parts at noised and at clean inputs (or answers, in fine-tuning).

    Args:
        loss_mask: [b, s], 1 where the label counts.
        noise: [b, s], as `get_batch` returns it; None for no such report.
        output_tensor: losses [b, s].
        copies: some samples are noised copies of others.
        evaluated: labels [b, s] whose bits per byte are also reported.

    Returns:
        The summed loss, its number of tokens, and the report: for each name [sum, count], which Megatron sums over
        micro batches and data-parallel ranks before it divides. A name whose count is 0 is reported as NaN.
    """
    noised = None if noise is None else (noise & NOISED).bool()
    copied = (noise & COPY).bool() if copies and noise is not None else None
    loss, count, report = next_token_loss(output_tensor, loss_mask, noised, answers=get_args().meap_sft, copies=copied)
    bad_steps.refuse(loss)
    if evaluated is not None and (sizes := text_bytes(get_tokenizer())) is not None:
        table = torch.from_numpy(sizes).to(evaluated.device)
        report[BITS_PER_BYTE] = bits_per_byte(output_tensor, loss_mask, evaluated, table)
    return loss, count.detach().to(torch.int), report
