"""Decode steps of attached models as CUDA graphs: the host launches a step, not its thousand kernels.

Between two steps a model differs in its token and the token's position; the cache differs in what its attention reads.
So a step is captured once for each batch size, recipe and kind of call. At each step the pending tokens enter the tiers
as always, each attention of the graph is given its new arguments, and the graph is replayed. What is unusual runs as it
would without graphs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.utils import ModelOutput

from kvpolicy.attention.attend import whole
from kvpolicy.attention.steady import asked_of, known_of, note
from kvpolicy.hf.cache import CompressedCache
from kvpolicy.hf.calls import Call, names_of
from kvpolicy.hf.model_state import ModelState
from kvpolicy.hf.modes import nothing_hidden, precise
from kvpolicy.hf.usual import TENSORS, Unusual, named, usual
from kvpolicy.layer.layer import LayerCache
from kvpolicy.storage.affine import AffineStore

if TYPE_CHECKING:
    from kvpolicy.attention.cuda.graph import Launch

OF_CACHE = object()
"""Stands for the cache in what a step gives."""
AGAIN, SOON = 256, 8
"""Steps until a capture that failed is tried again, and one that no longer fits."""
WARM = 2
"""Steps that run without a graph first, so that all that happens once has happened."""
KEPT = 8
"""Graphs of a model that are kept."""
_graphs: WeakKeyDictionary[nn.Module, Graphs] = WeakKeyDictionary()


class Graphs:
    """The graphs of an attached model."""

    def __init__(self, owner: nn.Module) -> None:
        self.names = names_of(owner)
        self.steps: dict[Any, Captured] = {}
        self.warm: Counter[Any] = Counter()
        self.reasons: Counter[str] = Counter()
        """Why steps ran without a graph, and how many."""
        self.replayed = 0
        """Steps that were replayed."""
        self._lock = threading.Lock()
        """Held from the new arguments of a graph to its output: threads share graphs."""

    def clear(self) -> None:
        """Forget all graphs, and give their memory back. Steps are captured anew."""
        with self._lock:
            self.steps, self.warm = {}, Counter()

    def forward(self, original: Callable[..., Any], owner: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        call = Call(self.names, args, kwargs)
        try:
            cache, given, key = usual(call, owner)
            with self._lock, torch.cuda.device(given["input_ids"].device):
                found = self._step(original, owner, call, cache, given, key).replay(cache, given)
                self.replayed += 1
                return found
        except Unusual as reason:
            self.reasons[str(reason)] += 1
        return original(*args, **kwargs)

    def _step(
        self,
        original: Callable[..., Any],
        owner: nn.Module,
        call: Call,
        cache: CompressedCache,
        given: dict[str, Tensor],
        key: Any,
    ) -> Captured:
        """The graph of a step, its arguments those of this one."""
        _commit(cache, given["input_ids"].device)
        key = (*key, _watched(cache))
        step = self.steps.get(key)
        if step is not None and (step.stale() or _columns(cache) > step.room):
            del self.steps[key]
            step = None
        if step is None:
            if self.warm[key] < WARM:
                self.warm[key] += 1
                raise Unusual("the first steps of a kind run without")
            if len(self.steps) >= KEPT:
                self.steps.pop(next(iter(self.steps)))
            step = self.steps[key] = _captured(original, owner, call, cache, given)
        elif step.reason is None:
            try:
                step.reason = step.renew(cache)
                step.again = SOON
            except RuntimeError as error:
                step.reason = f"a launch could not be changed: {error}"[:200]
        if step.reason is not None:
            raise Unusual(step.reason)
        return step


def _captured(
    original: Callable[..., Any], owner: nn.Module, call: Call, cache: CompressedCache, given: dict[str, Tensor]
) -> Captured:
    """A step that was captured, or the reason why it could not be."""
    step = Captured(owner, given)
    before = cache.get_seq_length()
    cache.reading.room = step.room = _room(_columns(cache))
    try:
        if step.reason is None:
            step.capture(original, call, cache)
    except Exception as error:
        step.reason = f"the model can't be captured: {type(error).__name__}: {error}"[:200]
    finally:
        cache.reading.room = 0
    if step.reason is not None:
        step.graph = step.out = step.recording = None
        for tiers in _tiers(cache):
            tiers.revert(before)
    return step


class Captured:
    """A step of a model with one batch size."""

    def __init__(self, owner: nn.Module, given: dict[str, Tensor]) -> None:
        self.state = ModelState(owner)
        self.reason = self.state.unfit()
        """Why it can't be replayed."""
        self.again = AGAIN
        """Steps until that is tried again."""
        self.given = {name: x.clone() for name, x in given.items()}
        self.recording: Any = None
        self.graph: Any = None
        self.out: Any = None
        self.kind: Any = None
        self.new: Any = None
        """The tokens of all layers, end to end, which the graph writes."""
        self.shapes: list[torch.Size] = []
        """Of each layer those of its keys and of its values."""
        self.told: Any = None
        """The attention weights of all layers, end to end, where policies ask for them; likewise."""
        self.told_shapes: list[torch.Size] = []
        self.room = 0
        """Columns that these have."""

    def stale(self) -> bool:
        """Whether it is to be captured anew: the model has changed, or it could not be captured some steps ago."""
        self.again -= self.reason is not None
        return not self.again or not self.state.same()

    def capture(self, original: Callable[..., Any], call: Call, cache: CompressedCache) -> None:
        """Capture a step, whose tokens become those of `cache` when it is replayed."""
        from kvpolicy.attention.cuda.graph import Recording, recording
        from kvpolicy.attention.cuda.heads import load

        device = self.given["input_ids"].device
        if self.room:  # policies are told of attention
            load(device)
        self.recording = Recording(device)
        self.recording.chains = _twins(cache)
        kwargs: dict[str, Any] = {name: call.get(name) for name in named(call) if name not in TENSORS}
        kwargs |= self.given
        mask = kwargs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        self.graph = torch.cuda.CUDAGraph(keep_graph=True)
        token = nothing_hidden.set(mask)
        try:
            with recording(self.recording), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.out = original(**kwargs)
                for layer in _tiers(cache):
                    layer.hold()
                pending = [x for layer in _tiers(cache) for x in (layer.pending["keys"], layer.pending["values"])]
                self.new = torch.cat([x.flatten() for x in pending])
                told = [x for layer in _tiers(cache) for x in _weights(layer)]
                self.told = torch.cat([x.flatten() for x in told]) if told else None
        finally:
            nothing_hidden.reset(token)
        tiers = _tiers(cache)
        launches = self.recording.launches
        if not isinstance(self.out, ModelOutput):
            self.reason = "the model gives no ModelOutput"
        elif self.recording.unfit is not None:
            self.reason = self.recording.unfit
        elif [_reader(launch, tiers) for launch in launches] != list(range(len(tiers))):
            self.reason = "not every layer reads its own tokens in one launch"
        if self.reason is None:
            self.graph.instantiate()
            self.shapes, self.told_shapes = [x.shape for x in pending], [x.shape for x in told]
            # Nothing of the cache is to live on with the graph.
            self.kind = type(self.out)
            self.out = {name: OF_CACHE if x is cache else x for name, x in self.out.items()}
            self.recording.launches = [launch._replace(stores=()) for launch in launches]

    def renew(self, cache: CompressedCache) -> str | None:
        """Let the graph read `cache` as it is now; returns why not, if it can't."""
        handle = self.graph.raw_cuda_graph_exec()
        for launch, layer in zip(self.recording.launches, _tiers(cache), strict=True):
            reason = _renewed(handle, launch, layer)
            if reason is not None:
                return reason
        return None

    def replay(self, cache: CompressedCache, given: dict[str, Tensor]) -> Any:
        """The step's output; its tokens are now those of `cache`."""
        for name, x in given.items():
            self.given[name].copy_(x, non_blocking=True)
        self.graph.replay()
        # Copies: the next replay, with any cache and from any thread, writes over what the graph gives.
        new = iter(_parts(self.new.clone(), self.shapes))
        for layer in _tiers(cache):
            layer.pending = {"keys": next(new), "values": next(new)}
        self._tell(cache)
        own = {name: cache if x is OF_CACHE else tree_map_only(Tensor, Tensor.clone, x) for name, x in self.out.items()}
        return self.kind(**own)

    def _tell(self, cache: CompressedCache) -> None:
        """Let observers know of the attention weights that the graph wrote."""
        weights = iter(() if self.told is None else _parts(self.told.clone(), self.told_shapes))
        for layer in _tiers(cache):
            if layer.placement.kinds:
                layer.observer = None
                observer = layer.expect()
                if observer.queries:
                    observer.found = [(next(weights), None) for _ in observer.found]


def _renewed(graph: int, launch: Launch, layer: LayerCache) -> str | None:
    """Let a launch read what a layer holds now; returns why not, if it can't."""
    from kvpolicy.attention.cuda.backend import renewal

    query, new, options = launch.call
    observer = options.observer
    about = options.scaling, options.softcap, options.sinks is None, observer and observer.room, Captured
    asked = asked_of(layer, query, new, *about)
    known = known_of(layer, asked)
    if known is not None and layer.stood is not None:
        found, addresses = known.again, layer.stood.addresses
    else:
        planned = renewal(launch, whole(layer, new))
        if isinstance(planned, str):
            return planned
        found, addresses = planned
        note(layer, asked, found)
    reason: str | None = found(graph, launch, addresses, layer.stores)
    return reason


def _parts(x: Tensor, shapes: list[torch.Size]) -> Sequence[Tensor]:
    """What lies end to end in `x`."""
    if all(shape == shapes[0] for shape in shapes):
        return x.view(len(shapes), *shapes[0]).unbind(0)
    return [own.view(shape) for own, shape in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)]


def _twins(cache: CompressedCache) -> dict[int, Any]:
    """Copies of the transforms of all stores that have begun, by the identity of these."""
    stores = (store for layer in _tiers(cache) for own in layer.stores.values() for store in own)
    chains = (store.chain for store in stores if isinstance(store, AffineStore))
    return {id(chain): chain.twin() for chain in chains if chain is not None and chain.state}


def _watched(cache: CompressedCache) -> bool:
    """Whether policies are told of this step's attention.

    Raises:
        Unusual: some are, and others not.
    """
    counted = [layer.counted(1) for layer in _tiers(cache) if layer.placement.kinds]
    told = {bool(c.queries) for c in counted}
    if len(told) > 1 or any(c.queries and not c.all for c in counted):
        raise Unusual("policies that are told of some attention")
    return any(told)


def _columns(cache: CompressedCache) -> int:
    """Columns of a step's attention weights, if policies ask for them."""
    return max((layer.planner.width + 1 for layer in _tiers(cache) if layer.placement.kinds), default=0)


def _room(columns: int) -> int:
    """Columns that a graph is captured with."""
    return columns + max(columns // 4, 512) if columns else 0


def _weights(layer: LayerCache) -> list[Tensor]:
    """The attention weights that a layer was told of in a capture."""
    found = [] if layer.observer is None else [x for x in layer.observer.found if x is not None]
    if any(counts is not None for _, counts in found):
        raise Unusual("attention that policies are told of in part")
    return [x for x, _ in found]


def _commit(cache: CompressedCache, device: torch.device) -> None:
    """Let the pending tokens into the tiers, as the layers would one after the other.

    Raises:
        Unusual: some layer holds none or waits for queries, or some places of its stores are empty, or scorers see
            queries.
    """
    tiers = _tiers(cache)
    with precise(device):
        cache.guard.commit(1)
        # What a step knows of them comes to the device here, not within a capture.
        columns = [layer.columns() for layer in tiers]
        for found in columns:
            if found.slots is not None and not found.gaps:
                found.slots()
    if any(not layer.committed for layer in tiers):
        raise Unusual("layers that hold nothing")
    if any(layer.page_table is not None for layer in tiers):
        raise Unusual("readers, which choose pages by the query")
    if any(layer.wants_queries for layer in tiers):
        raise Unusual("transforms that are still to be fitted to queries")
    if any(layer.placement.scores.reads_query(prompting=layer.step.prompt is None) for layer in tiers):
        raise Unusual("scorers that see queries")
    if any(found.gaps for found in columns):
        raise Unusual("rows or heads that hold different numbers of tokens")


def _tiers(cache: CompressedCache) -> list[LayerCache]:
    return [layer.tiers for layer in cache.layers]


def _reader(launch: Any, tiers: list[LayerCache]) -> int:
    """The number of the layer whose stores a launch reads; -1 for none."""
    own = {id(store) for store in launch.stores}
    every = ({id(s) for stores in layer.stores.values() for s in stores} for layer in tiers)
    return next((i for i, stores in enumerate(every) if own & stores), -1)


def forward(owner: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a model that is attached with graphs, and of its copies, which have none."""
    # Shallow copies of a model, such as the replicas of DataParallel, carry this too, with the owner in it.
    called = sys._getframe(1).f_locals.get("self")
    if called is not owner and isinstance(called, type(owner)):
        return type(called).forward(called, *args, **kwargs)
    graphs = _graphs.get(owner)
    return original(*args, **kwargs) if graphs is None else graphs.forward(original, owner, args, kwargs)


def install(owner: nn.Module) -> Graphs:
    """Let a model replay its decode steps."""
    found = _graphs[owner] = Graphs(owner)
    given = functools.partial(forward, owner, owner.forward)
    owner.__dict__["forward"] = functools.update_wrapper(given, owner.forward)
    return found


def remove(owner: nn.Module) -> None:
    """Leave a model as it was."""
    graphs = _graphs.pop(owner, None)
    if graphs is not None:
        graphs.clear()
    given = owner.__dict__.get("forward")
    if isinstance(given, functools.partial) and given.func is forward:
        del owner.__dict__["forward"]
        before = given.args[1]
        if getattr(before, "__func__", None) is not type(owner).forward:
            owner.__dict__["forward"] = before
