//! A linear layer of the model: its tensors, its gemm forward, and its two gemms backward.

use super::Llama;
use super::adapter::{AdapterActivations, AdapterBackward, Place};
use crate::device::{AdaptedLinear, AdapterTerms, ComputeBuffer, Device, Floats};
use crate::error::Result;

/// One value of type `T` for each tensor of a linear layer: a weight, a gradient, an optimiser state or a name.
#[derive(Clone, Debug)]
pub struct Projection<T> {
    /// `[outputs, inputs]`
    pub weight: T,
    /// `[outputs]`
    pub bias: Option<T>,
    /// The low-rank adapters of its modules.
    pub adapter: Option<Adapter<T>>,
}

/// One value of type `T` for each of the two tensors of a projection's low-rank adapters, which hold the matrices of its
/// adapted modules one after the other.
#[derive(Clone, Debug)]
pub struct Adapter<T> {
    /// `[modules * r, inputs]`
    pub a: T,
    /// `[outputs of the adapted modules, r]`
    pub b: T,
}

impl<T> Adapter<T> {
    pub(super) fn try_map<U, E>(
        &self,
        make: &mut impl FnMut(&T) -> std::result::Result<U, E>,
    ) -> std::result::Result<Adapter<U>, E> {
        Ok(Adapter { a: make(&self.a)?, b: make(&self.b)? })
    }
}

impl<T> Projection<T> {
    /// A projection of the same form, made value by value in the order of [`Projection::iter`].
    pub(super) fn try_map<U, E>(
        &self,
        make: &mut impl FnMut(&T) -> std::result::Result<U, E>,
    ) -> std::result::Result<Projection<U>, E> {
        Ok(Projection {
            weight: make(&self.weight)?,
            bias: self.bias.as_ref().map(&mut *make).transpose()?,
            adapter: self.adapter.as_ref().map(|adapter| adapter.try_map(make)).transpose()?,
        })
    }

    /// The weight, then the bias and the adapter's `a` and `b` if there are some.
    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        std::iter::once(&self.weight).chain(&self.bias).chain(adapter)
    }

    /// As [`Projection::iter`].
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let adapter = self.adapter.iter_mut().flat_map(|adapter| [&mut adapter.a, &mut adapter.b]);
        std::iter::once(&mut self.weight).chain(&mut self.bias).chain(adapter)
    }
}

/// Operands of [`Llama::project_backward`].
pub(super) struct ProjectionBackward<'a, D: Device> {
    /// Assigned, `[rows, inputs]`: the gradient of `x`.
    pub dx: &'a mut ComputeBuffer<D>,
    /// Accumulated: the gradients of the layer's tensors; `None` for those that are frozen.
    pub dweights: &'a mut Projection<Option<Floats<D>>>,
    /// `[rows, outputs]`: the gradient of the layer's output.
    pub dout: &'a ComputeBuffer<D>,
    /// `[rows, inputs]`, the input of the forward.
    pub x: &'a ComputeBuffer<D>,
    /// What its adapters keep of the forward.
    pub adapter: Option<&'a mut AdapterActivations<D>>,
    /// Which projection.
    pub place: Place,
}

impl<D: Device> Llama<D> {
    /// Assigns `out[rows, outputs] = x[rows, inputs] * weight^T + bias`, and what adapters add.
    pub(super) fn project(
        &self,
        out: &mut ComputeBuffer<D>,
        x: &ComputeBuffer<D>,
        mut adapter: Option<&mut AdapterActivations<D>>,
        place: Place,
    ) -> Result<()> {
        let (weights, shape) = (self.projection(place), place.site.shape(&self.config, place.tokens));
        let (weight, bias) = (&weights.weight, weights.bias.as_ref());
        self.adapter_inner(adapter.as_deref_mut(), x, place)?;
        match self.adapter_terms(adapter.as_deref(), place)? {
            None => self.device.linear_forward(out, x, weight, bias, shape),
            Some((inner, b, parts)) => {
                let terms = AdapterTerms { inner, b, parts: &parts };
                self.device.adapted_linear_forward(AdaptedLinear { out, x, weight, bias, shape, terms })
            }
        }
    }

    /// Accumulates the gradients of weight and bias, unless both are frozen, and of the adapters, then assigns the gradient of
    /// the input.
    pub(super) fn project_backward(&self, operands: ProjectionBackward<'_, D>) -> Result<()> {
        let ProjectionBackward { dx, dweights, dout, x, adapter, place } = operands;
        let (weights, shape) = (self.projection(place), place.site.shape(&self.config, place.tokens));
        let dweight = dweights.weight.as_mut();
        let dbias = dweights.bias.as_mut().and_then(Option::as_mut);
        if dweight.is_some() || dbias.is_some() {
            self.device.linear_backward_weight(dweight, dbias, dout, x, shape)?;
        }
        if weights.adapter.is_some() {
            let dadapter = dweights.adapter.as_mut();
            return self.adapter_backward(AdapterBackward { dx, dadapter, dout, x, adapter, place });
        }
        self.device.linear_backward_input(dx, dout, &weights.weight, shape)
    }

    /// The tensors of a projection.
    pub(super) fn projection(&self, place: Place) -> &Projection<ComputeBuffer<D>> {
        place.site.of(&self.weights.layers[place.layer])
    }
}
