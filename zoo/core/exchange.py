"""What processes that hold one sequence together tell each other, and its gradients.

Process r holds a slice of every row, the ones before it what comes before. All of them make the
same exchanges in the same order, and backward makes them in the reverse order: each takes a token
from the one before, a scalar that is always 0, and leaves one for the next, so that autograd can
neither leave one out, because somebody had no use for what came, nor change their order. The last
token is added to the output (`Exchanges.close`).
"""

import torch

from .wire import Wire


class Exchanges:
    """The exchanges of one forward pass of one process.

    Args:
        group, device: as of `Wire`.

    Attributes:
        wire: the `Wire`.
        rank, size: as of it.
        keeps: whether layers are run again in backward, and then get what they got the first time.
    """

    def __init__(self, group, device):
        self.wire = Wire(group, device)
        self.rank, self.size = self.wire.rank, self.wire.size
        self.token = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        self.keeps, self.kept, self.is_closed = False, {}, False

    def make(self, function, *arguments):
        """Makes an exchange.

        Args:
            function: an autograd function of (token, `Wire`, *arguments), whose last result is the
                next token.
            arguments: others.
        """
        *results, token = function.apply(self.token, self.wire, *arguments)
        if not self.is_closed:
            self.token = token
        return results

    def make_once(self, name, function, *arguments):
        """The same, but a layer that is run again in backward gets what it got the first time.

        Args:
            name: of the exchange, one of its kind in the whole pass.
            function, arguments: as of `make`; it may save nothing by `save_for_backward`, which a
                checkpoint would count.
        """
        if not self.keeps:
            return self.make(function, *arguments)
        if name not in self.kept:
            self.kept[name] = self.make(function, *arguments)
        return self.kept[name]

    def close(self, x_BTD):
        """The output, after all exchanges; backward begins with the last one."""
        token, self.is_closed = self.token, True
        # A layer that is run again in backward starts from here: it is no part of a later one.
        self.token = torch.zeros_like(token, requires_grad=token.requires_grad)
        return x_BTD + token.to(x_BTD.device, x_BTD.dtype)

    def from_left(self, *tensors):
        """What the process before this one has of these, zeros on the first.

        Args:
            tensors: of one shape and dtype on all processes.
        """
        return self.make(_FromLeft, *tensors)

    def wait_for(self, like, name):
        """What the process before passes on under this name, as soon as it has it.

        Args:
            like: of its shape and dtype.
            name: a layer that is run again in backward gets what it got the first time.
        """
        return self.make_once(("wait", name), _WaitFor, like)[0]

    def pass_on(self, x, name):
        """Gives a tensor to the process after this one, which waits for it."""
        self.make_once(("pass", name), _PassOn, x)

    def gathered(self, x):
        """What every process has, [R, ...]; its gradient is the sum of what they do with it."""
        return self.make(_Gather, x)[0]

    def to_each(self, x, sizes, sizes_there):
        """A part for each process; what each has for this one. As `Wire.all_to_all`."""
        return self.make(_ToEach, x, sizes, sizes_there)[0]

    def affine(self, a, u, name=None, everyones_a=None):
        """What has come of a state when it arrives at this process: S -> A S + U in each.

        Args:
            a: of this slice, as `u` but for sizes of 1; [..., K, K] is a matrix if `u` is
                [..., K, V], which a size of 1 is not.
            u: [..., K, V], what comes of nothing.
            name: as of `make_once`; None: a layer that is run again makes the exchange again.
            everyones_a: `a` of each process, where all know it: then it is not exchanged.

        Returns:
            What comes out of the process before this one; zeros on the first.
        """
        if name is None:
            return self.make(_Affine, a, u, everyones_a)[0]
        return self.make_once(name, _Affine, a, u, everyones_a)[0]


class _FromLeft(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, *tensors):
        ctx.wire, ctx.like = wire, [torch.empty_like(x, device="meta") for x in tensors]
        ctx.device = tensors[0].device
        return *wire.shift(tensors, 1), token.clone()

    @staticmethod
    def backward(ctx, *grads):
        *grads, grad_token = grads
        grads = [
            torch.zeros_like(x, device=ctx.device) if grad is None else grad
            for x, grad in zip(ctx.like, grads)
        ]
        return grad_token, None, *ctx.wire.shift(grads, -1)


class _WaitFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, like):
        ctx.wire = wire
        return wire.receive(torch.empty_like(like), wire.rank - 1), token.clone()

    @staticmethod
    def backward(ctx, grad, grad_token):
        ctx.wire.send(grad, ctx.wire.rank - 1)
        return grad_token, None, None


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, x):
        ctx.wire, ctx.like, ctx.device = wire, torch.empty_like(x, device="meta"), x.device
        wire.send(x, wire.rank + 1)
        return (token.clone(),)

    @staticmethod
    def backward(ctx, grad_token):
        grad = torch.empty_like(ctx.like, device=ctx.device)
        return grad_token, None, ctx.wire.receive(grad, ctx.wire.rank + 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, x):
        ctx.wire = wire
        return torch.stack(wire.all_gather(x)), token.clone()

    @staticmethod
    def backward(ctx, grad, grad_token):
        return grad_token, None, ctx.wire.reduce_scatter(grad)


class _ToEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token, wire, x, sizes, sizes_there):
        ctx.wire, ctx.sizes, ctx.sizes_there = wire, sizes, sizes_there
        return wire.all_to_all(x, sizes, sizes_there), token.clone()

    @staticmethod
    def backward(ctx, grad, grad_token):
        grad = ctx.wire.all_to_all(grad, ctx.sizes_there, ctx.sizes)
        return grad_token, None, grad, None, None


class _Affine(torch.autograd.Function):
    # What backward needs is kept as it is and not by `save_for_backward`: a checkpoint counts what
    # is saved, and a layer that is run again does not come here a second time.
    @staticmethod
    def forward(ctx, token, wire, a, u, everyones_a):
        if wire.are_few:
            ctx.all_a = wire.all_gather(a) if everyones_a is None else everyones_a
            all_u = wire.all_gather(u)
            entering = torch.zeros_like(u)
            for rank in range(wire.rank):
                entering = _apply(ctx.all_a[rank], entering) + all_u[rank]
        else:
            ctx.all_a = None
            entering = scan(wire, a.detach(), u.detach(), 1)
        ctx.wire, ctx.a, ctx.entering = wire, a.detach(), entering
        return entering.clone(), token.clone()

    @staticmethod
    def backward(ctx, grad, grad_token):
        wire, a, entering = ctx.wire, ctx.a, ctx.entering
        if ctx.all_a is None:
            grad_u = scan(wire, _transposed(a, entering), grad, -1)
        else:
            every, grad_u = wire.all_gather(grad), torch.zeros_like(grad)
            for rank in reversed(range(wire.rank + 1, wire.size)):
                a_right = _transposed(ctx.all_a[rank], entering)
                grad_u = _apply(a_right, grad_u) + every[rank]
        if _is_matrix(a, entering):
            grad_a = grad_u @ entering.mT
        else:
            grad_a = (grad_u * entering).sum_to_size(a.shape)
        return grad_token, None, grad_a, grad_u, None


def _is_matrix(a, u):
    return a.shape[-1] == a.shape[-2] == u.shape[-2] and a.shape[-1] > 1


def _apply(a, u):
    return a @ u if a.shape[-1] == a.shape[-2] == u.shape[-2] > 1 else a * u


def _transposed(a, u):
    return a.mT if _is_matrix(a, u) else a


def _composed(before_a, before_u, a, u):
    """One affine function after another."""
    return a @ before_a if _is_matrix(a, u) else a * before_a, _apply(a, before_u) + u


def scan(wire, a, u, direction, composed=_composed):
    """What everyone before has come to, in log2 steps (Hillis and Steele 1986); zeros at the end.

    Args:
        wire: the `Wire`.
        a, u: of this process.
        direction: 1 from left to right, -1 from right to left.
        composed: (a, u) of the function that comes first and of the next, to those of both.
    """
    place = wire.rank if direction == 1 else wire.size - 1 - wire.rank
    step = 1
    while step < wire.size:
        before_a, before_u = wire.shift([a, u], direction * step)
        if place >= step:
            a, u = composed(before_a, before_u, a, u)
        step *= 2
    return wire.shift([u], direction)[0]
