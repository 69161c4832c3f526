"""Reading a gated FFN's forward: which classes compute exactly ``down(act(gate(x)) * up(x))``.

Names alone lie: of the classes in transformers with the gated names, one in ten clamps, scales,
normalises or swaps something in between. So a class's source decides. Its forward is reduced to one
expression over ``self`` and ``x`` (annotations, docstrings and local names removed) and compared
with the two forms below; everything else keeps its own forward.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# The functions that a forward may call instead of a module, and the modules that call just them.
_FUNCTIONS = (
    (functional.silu, nn.SiLU()),
    (functional.relu, nn.ReLU()),
    (functional.gelu, nn.GELU()),
)


@dataclass(frozen=True)
class GatedForward:
    """The submodule names of a forward that is exactly a gated FFN.

    Attributes:
        gate: makes the gate, or gate and up in one tensor where ``up`` is None (gate first).
        up: makes up, or None.
        activation: the activation, or None where the forward calls a function.
        down: the last projection.
        function: a module that computes what the forward's function does, or None.
    """

    gate: str
    up: str | None
    activation: str | None
    down: str
    function: nn.Module | None = None

    def activation_of(self, owner: nn.Module) -> nn.Module:
        """The module that computes the activation of an FFN of this form."""
        return owner._modules.get(self.activation, self.function)


def read_forward(module: nn.Module) -> GatedForward | None:
    """The form of ``type(module).forward``, or None if it is not exactly a known one.

    None also where the source can't be read or a name is no submodule of ``module``.
    """
    form = _read_class(type(module))
    if form is None:
        return None
    names = {form.gate, form.up, form.activation, form.down} - {None}
    return form if all(module._modules.get(name) is not None for name in names) else None


@dataclass(frozen=True)
class ClampedGate:
    """A gate whose activation is no module, of experts or a dense FFN: gate and up are clamped.

    With a = sigmoid(alpha * gate) * gate, the activation, they go on with ``(up + 1) * a``; without
    an ``alpha``, a = silu(gate) and ``up * a``.

    Attributes:
        interleaved: whether gate and up take turns; else the gate is the first half.
        limit: the attribute that holds the largest gate, and the largest magnitude of up.
        alpha: the attribute that holds the sigmoid's factor, or None.
    """

    interleaved: bool
    limit: str
    alpha: str | None

    def parts(self, owner: nn.Module, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """The activation, and what it is multiplied by."""
        if self.interleaved:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        limit = getattr(owner, self.limit)
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        if self.alpha is None:
            return functional.silu(gate), up
        return gate * torch.sigmoid(gate * getattr(owner, self.alpha)), up + 1

    def source(self, x: str = "x") -> str:
        """The expression of a method that computes this of ``x``."""
        gate, up = f"{x}.chunk(2, dim=-1)[0]", f"{x}.chunk(2, dim=-1)[1]"
        if self.interleaved:
            gate, up = f"{x}[..., ::2]", f"{x}[..., 1::2]"
        gate = f"{gate}.clamp(max=self.{self.limit})"
        up = f"{up}.clamp(min=-self.{self.limit}, max=self.{self.limit})"
        if self.alpha is None:
            return f"global F.silu({gate}) * {up}"
        return f"({up} + 1) * ({gate} * global torch.sigmoid({gate} * self.{self.alpha}))"


_CLAMPED = (
    ClampedGate(True, "limit", "alpha"),  # gpt-oss
    ClampedGate(False, "swiglu_limit", None),  # Hunyuan 4, GLM 5
    ClampedGate(False, "swiglu_limit", "swiglu_alpha"),  # MiniMax M3
)
_GATED = "self.gate_up_proj(x)"


def clamped_gate(owner: nn.Module, dense: bool) -> ClampedGate | None:
    """How experts gate whose ``_apply_gate`` is exactly a known one.

    Or a dense FFN whose whole forward is, by its ``gate_up_proj`` and ``down_proj``.
    """
    cls = type(owner)
    if not dense:
        return _read_gate(getattr(cls, "_apply_gate", None), dense)
    return _read_gate(cls.forward, dense) if cls.__call__ is nn.Module.__call__ else None


@functools.cache
def _read_gate(function: object, dense: bool) -> ClampedGate | None:
    expression = _read_function(function)
    if expression is None:
        return None
    names = _names_of(function)
    known = {"F": functional, "torch": torch}
    if any(names.get(name, module) is not module for name, module in known.items()):
        return None
    # Two ways to write the same.
    source = ast.unparse(expression).replace("min=None, ", "").replace(" + 1.0)", " + 1)")
    for gate in _CLAMPED:
        if source == (f"self.down_proj({gate.source(_GATED)})" if dense else gate.source()):
            return gate
    return None


def takes_all_tokens(experts: nn.Module) -> bool:
    """Whether experts compute exactly as Llama 4's do: all tokens by each expert, in its block.

    The input's rows are those of the first expert, of the second, and so on; a token that is not
    routed to an expert has zeros there.
    """
    expression = _read_function(type(experts).forward)
    return expression is not None and ast.unparse(expression) == _ALL_TOKENS


_GATE_UP = (
    "global torch.bmm(x.view(self.gate_up_proj.shape[0], -1, self.hidden_size), self.gate_up_proj)"
    ".chunk(2, dim=-1)"
)
_ALL_TOKENS = (
    f"global torch.bmm({_GATE_UP}[1] * self.act_fn({_GATE_UP}[0]), self.down_proj)"
    ".view(-1, self.hidden_size)"
)


@functools.cache
def _read_class(cls: type) -> GatedForward | None:
    if cls.__call__ is not nn.Module.__call__:
        return None
    expression = _read_function(cls.forward)
    if expression is None:
        return None
    return _match(expression, _names_of(cls.forward))


def _names_of(function: object) -> dict[str, object]:
    """What a function finds by the names that are not its own."""
    names = inspect.getclosurevars(function)
    return {**names.globals, **names.nonlocals}


def _read_function(function: object) -> ast.expr | None:
    """What a method returns as one expression; None where that can't be read."""
    # The source of what wraps another function would be the other's.
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    return _single_expression(definition)


def _single_expression(definition: ast.FunctionDef) -> ast.expr | None:
    """What the function returns, in terms of ``self`` and ``x`` only; None if it does more."""
    arguments = definition.args
    if (
        len(arguments.args) != 2
        or arguments.posonlyargs
        or arguments.kwonlyargs
        or arguments.vararg
        or arguments.kwarg
        or arguments.defaults
    ):
        return None
    owner, given = (argument.arg for argument in arguments.args)
    values: dict[str, ast.expr] = {owner: ast.Name("self"), given: ast.Name("x")}
    made: list[ast.expr] = []
    for statement in definition.body:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())):
                continue
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                values[name] = _substitute(value, values)
                made.append(values[name])
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=value) if all(
                isinstance(name, ast.Name) for name in names
            ):
                whole = _substitute(value, values)
                made += whole.elts if isinstance(whole, ast.Tuple) else [whole]
                for index, name in enumerate(names):
                    values[name.id] = (
                        whole.elts[index]
                        if isinstance(whole, ast.Tuple)
                        else ast.Subscript(whole, ast.Constant(index))
                    )
            case ast.Return(value=ast.expr() as value):
                returned = _substitute(value, values)
                # What is made and not returned may have been made for what else it does.
                text = ast.unparse(returned)
                used = all(ast.unparse(one) in text for one in made)
                return returned if used and statement is definition.body[-1] else None
            case _:
                return None
    return None


def _substitute(expression: ast.expr, values: dict[str, ast.expr]) -> ast.expr:
    class Substitute(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return values.get(node.id, ast.Name(f"global {node.id}"))

    # A fresh parse, because a transformer changes the tree that it walks.
    return Substitute().visit(ast.parse(ast.unparse(expression), mode="eval").body)


def _match(expression: ast.expr, names: Mapping[str, object]) -> GatedForward | None:
    match expression:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=down),
            args=[ast.BinOp(left=left, op=ast.Mult(), right=right)],
            keywords=[],
        ):
            # A product of two is the same bits in either order.
            return _match_factors(left, right, down, names) or _match_factors(
                right, left, down, names
            )
    return None


def _match_factors(
    activated: ast.expr, up: ast.expr, down: str, names: Mapping[str, object]
) -> GatedForward | None:
    match activated:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=activation), args=[gate], keywords=[]
        ):
            function = None
        case ast.Call(func=called, args=[gate], keywords=[]):
            activation, function = None, _module_for(called, names)
            if function is None:
                return None
        case _:
            return None
    gate_name, up_name = _projection(gate), _projection(up)
    if gate_name and up_name:
        return GatedForward(gate_name, up_name, activation, down, function)
    gate_half, up_half = _half(gate, 0), _half(up, 1)
    if gate_half and gate_half == up_half:
        return GatedForward(gate_half, None, activation, down, function)
    return None


def _module_for(called: ast.expr, names: Mapping[str, object]) -> nn.Module | None:
    """The module for the function that an expression calls, by a forward's ``names``."""
    scope, _, path = ast.unparse(called).partition(" ")
    if scope != "global":
        return None
    first, *rest = path.split(".")
    found = names.get(first)
    for name in rest:
        found = getattr(found, name, None)
    return next((module for function, module in _FUNCTIONS if function is found), None)


def _projection(expression: ast.expr) -> str | None:
    """``name`` of ``self.name(x)``."""
    match expression:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=name),
            args=[ast.Name(id="x")],
            keywords=[],
        ):
            return name
    return None


def _half(expression: ast.expr, index: int) -> str | None:
    """``name`` of ``self.name(x).chunk(2, dim=-1)[index]``."""
    match expression:
        case ast.Subscript(
            value=ast.Call(
                func=ast.Attribute(value=whole, attr="chunk"),
                args=[ast.Constant(value=2)],
                keywords=[
                    ast.keyword(
                        arg="dim", value=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1))
                    )
                ],
            ),
            slice=ast.Constant(value=found),
        ) if found == index:
            return _projection(whole)
    return None
