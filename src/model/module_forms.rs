//! Adapters whose rank or scale differs between modules, as PEFT's `rank_pattern` and `alpha_pattern` make them.
//!
//! On the device all adapters of a model have the rank of the largest: the rows of `A` and columns of `B` beyond a module's own rank
//! are zero. The gradient of each is a product with the other, so it is zero too, and an optimiser leaves them at zero: the numbers are
//! those of the module's own rank. Files hold the matrices without them.

use super::LoraSettings;
use super::adapter::AdaptedModule;
use super::config::TensorSpec;

/// The form of one module's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleForm {
    /// `r`
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
}

/// The form of every module's adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleForms {
    /// For each layer, in the order of [`AdaptedModule::ALL`].
    layers: Vec<[ModuleForm; AdaptedModule::ALL.len()]>,
}

/// Which matrix of an adapter a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Matrix {
    A,
    B,
}

/// The layer, module and matrix of a tensor `....layers.N.MODULE.lora_A.weight`.
fn place(name: &str) -> Option<(usize, AdaptedModule, Matrix)> {
    let (_, rest) = name.split_once("model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (path, matrix) = match rest.strip_suffix(".lora_A.weight") {
        Some(path) => (path, Matrix::A),
        None => (rest.strip_suffix(".lora_B.weight")?, Matrix::B),
    };
    let module = AdaptedModule::ALL.into_iter().find(|module| module.path() == path)?;
    Some((layer.parse().ok()?, module, matrix))
}

impl ModuleForms {
    /// The forms that `form` gives for the modules of `layers` layers, each by its name in the model:
    /// `model.layers.0.self_attn.q_proj`.
    ///
    /// # Errors
    /// The first error of `form`.
    pub fn of<E>(layers: usize, form: impl Fn(&str) -> Result<ModuleForm, E>) -> Result<Self, E> {
        let mut forms = Vec::with_capacity(layers);
        for layer in 0..layers {
            let mut of_layer = [ModuleForm { rank: 1, alpha: 1.0 }; AdaptedModule::ALL.len()];
            for (found, module) in of_layer.iter_mut().zip(AdaptedModule::ALL) {
                *found = form(&format!("model.layers.{layer}.{}", module.path()))?;
            }
            forms.push(of_layer);
        }
        Ok(ModuleForms { layers: forms })
    }

    /// The form of a module's adapter; `None` for a layer that there is not.
    pub fn get(&self, layer: usize, module: AdaptedModule) -> Option<ModuleForm> {
        Some(self.layers.get(layer)?[module as usize])
    }

    /// The largest rank of `settings.modules`.
    pub fn largest_rank(&self, settings: &LoraSettings) -> usize {
        let of_layer = |layer: &[ModuleForm; AdaptedModule::ALL.len()]| {
            settings.modules.iter().map(|module| layer[module as usize].rank).max()
        };
        self.layers.iter().filter_map(of_layer).max().unwrap_or(settings.rank)
    }

    /// The factor of what a module's adapter adds.
    pub fn scale(&self, layer: usize, module: AdaptedModule, settings: &LoraSettings) -> f64 {
        let form = self.get(layer, module);
        form.map_or(settings.scale(), |ModuleForm { rank, alpha }| {
            LoraSettings { rank, alpha, ..*settings }.scale()
        })
    }

    /// A tensor of the model as files hold it: with the module's own rank.
    pub fn in_files(&self, tensor: &TensorSpec) -> TensorSpec {
        let Some((matrix, form)) = self.of_tensor(tensor) else { return tensor.clone() };
        let shape = match (matrix, &tensor.shape[..]) {
            (Matrix::A, &[_, inputs]) => vec![form.rank, inputs],
            (Matrix::B, &[outputs, _]) => vec![outputs, form.rank],
            (_, other) => other.to_vec(),
        };
        TensorSpec { shape, ..tensor.clone() }
    }

    fn of_tensor(&self, tensor: &TensorSpec) -> Option<(Matrix, ModuleForm)> {
        let (layer, module, matrix) = place(&tensor.name)?;
        Some((matrix, self.get(layer, module)?))
    }

    /// The values of a tensor of the model from those that files hold.
    pub fn widen(&self, tensor: &TensorSpec, values: Vec<f32>) -> Vec<f32> {
        let &[_, columns] = &tensor.shape[..] else { return values };
        let own = self.in_files(tensor);
        let own_columns = own.shape.last().copied().unwrap_or(columns).max(1);
        let mut wide = vec![0.0; tensor.values()];
        for (row, own_row) in wide.chunks_mut(columns.max(1)).zip(values.chunks(own_columns)) {
            row[..own_columns].copy_from_slice(own_row);
        }
        wide
    }

    /// Assigns `out`, the values that files hold of a tensor from index `offset` on; `read` assigns those of the model's tensor from
    /// an index on.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn narrow<E>(
        &self,
        tensor: &TensorSpec,
        offset: usize,
        out: &mut [f32],
        read: impl FnOnce(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
        let own = self.in_files(tensor).shape.last().copied().unwrap_or(columns).max(1);
        if own == columns || out.is_empty() {
            return read(offset, out);
        }
        let rows = offset / own..(offset + out.len()).div_ceil(own);
        let mut wide = vec![0.0; rows.len() * columns];
        read(rows.start * columns, &mut wide)?;
        for (value, index) in out.iter_mut().zip(offset..) {
            *value = wide[(index / own - rows.start) * columns + index % own];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AdaptedModules;

    fn forms() -> ModuleForms {
        let form = |name: &str| -> Result<ModuleForm, ()> {
            let rank = if name.ends_with("q_proj") && name.contains("layers.1.") { 2 } else { 3 };
            Ok(ModuleForm { rank, alpha: if name.contains("mlp") { 6.0 } else { 4.0 } })
        };
        ModuleForms::of(2, form).unwrap()
    }

    fn settings() -> LoraSettings {
        let modules = AdaptedModules::of(AdaptedModule::ALL);
        LoraSettings { modules, rank: 3, alpha: 4.0, dropout: 0.0, rslora: false }
    }

    fn tensor(name: &str, shape: &[usize]) -> TensorSpec {
        TensorSpec::new(format!("base_model.model.model.layers.{name}.weight"), shape)
    }

    #[test]
    fn ranks_and_scales_are_those_of_each_module() {
        let (forms, settings) = (forms(), settings());
        assert_eq!(forms.largest_rank(&settings), 3);
        let queries = LoraSettings { modules: AdaptedModules::of([AdaptedModule::Query]), ..settings };
        assert_eq!(forms.largest_rank(&queries), 3, "that of layer 0");
        assert_eq!(forms.scale(1, AdaptedModule::Query, &settings), 2.0);
        assert_eq!(forms.scale(0, AdaptedModule::Query, &settings), 4.0 / 3.0);
        assert_eq!(forms.scale(1, AdaptedModule::Down, &settings), 2.0);
        assert_eq!(
            forms.scale(0, AdaptedModule::Down, &LoraSettings { rslora: true, ..settings }),
            6.0 / 3f64.sqrt()
        );
    }

    /// What files hold becomes what the model holds, with zeros, and that again what files hold, in pieces of any size.
    #[test]
    fn values_go_to_the_model_and_back() {
        let forms = forms();
        for (name, shape, own) in [
            ("1.self_attn.q_proj.lora_A", [3, 5], [2, 5]),
            ("1.self_attn.q_proj.lora_B", [4, 3], [4, 2]),
            ("0.self_attn.q_proj.lora_B", [4, 3], [4, 3]),
        ] {
            let tensor = tensor(name, &shape);
            let file = forms.in_files(&tensor);
            assert_eq!(file.shape, own, "{name}");
            let values: Vec<f32> = (1..=file.values()).map(|value| value as f32).collect();
            let wide = forms.widen(&tensor, values.clone());
            assert_eq!(
                wide.iter().filter(|&&value| value == 0.0).count(),
                tensor.values() - file.values(),
                "{name}"
            );
            for piece in 1..=values.len() {
                let mut back = vec![0.0; values.len()];
                for (number, out) in back.chunks_mut(piece).enumerate() {
                    let read = |offset: usize, out: &mut [f32]| -> Result<(), ()> {
                        out.copy_from_slice(&wide[offset..][..out.len()]);
                        Ok(())
                    };
                    forms.narrow(&tensor, number * piece, out, read).unwrap();
                }
                assert_eq!(back, values, "{name}, pieces of {piece}");
            }
        }
        let wide = forms.widen(&tensor("1.self_attn.q_proj.lora_B", &[2, 3]), vec![1.0, 2.0, 3.0, 4.0]);
        assert_eq!(wide, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0]);
    }
}
