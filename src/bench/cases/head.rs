//! The operations between the last layer and the loss.

use std::ops::Range;

use super::{Case, Maker, WORD, batch, compute_size, outputs};
use crate::bench::inputs::{compute, floats};
use crate::bench::shapes::{self, Shape};
use crate::device::{
    BatchBuffers, ComputeBuffer, Device, Floats, HeadBackward, HeadForward, HeadMode, HeadShape,
    ObjectiveOperands, TokenCoefficients, TokenScores,
};
use crate::error::Result;
use crate::model::HeadOptions;
use crate::objective::{Objective, PairOutcome};

pub(super) fn makers<D: Device>() -> Vec<Maker<D>> {
    vec![
        gather_rows,
        gather_rows_backward,
        head_forward,
        head_backward,
        |device, shape| head_both(device, shape, Both::Main),
        |device, shape| head_both(device, shape, Both::WithEntropy),
        |device, shape| head_both(device, shape, Both::Recomputed),
        |device, shape| head_both(device, shape, Both::InOneChunk),
        pair_objective,
    ]
}

fn gather_rows<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, scored, width) = (shape.tokens(), shape.scored(), shape.config.hidden_size);
    let hidden = compute(device, 1, rows * width, 1.0)?;
    let batch = batch(device, shape)?;
    let out = outputs(device, &[scored * width], &[])?;
    let case = Case::new("gather_rows", out, move |device: &D, out| {
        device.gather_rows(&mut out.compute[0], &hidden, &batch, scored, width)
    });
    Ok(case.bytes(2 * compute_size::<D>() * scored * width + WORD * scored))
}

fn gather_rows_backward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (rows, scored, width) = (shape.tokens(), shape.scored(), shape.config.hidden_size);
    let dout = compute(device, 1, scored * width, 1.0)?;
    let batch = batch(device, shape)?;
    let out = outputs(device, &[rows * width], &[])?;
    let case = Case::new("gather_rows_backward", out, move |device: &D, out| {
        device.gather_rows_backward(&mut out.compute[0], &dout, &batch, rows, width)
    });
    Ok(case.bytes(compute_size::<D>() * (rows + scored) * width + 2 * WORD * rows))
}

/// The head's operands over all scored tokens of a batch.
struct Head<D: Device> {
    shape: HeadShape,
    batch: BatchBuffers<D>,
    objective: Objective,
    weight: ComputeBuffer<D>,
    /// The hidden rows as they are before the backward replaces them.
    pristine: ComputeBuffer<D>,
    coefficients: TokenCoefficients<D>,
}

impl<D: Device> Head<D> {
    fn new(device: &D, shape: &Shape, mode: HeadMode, entropy: bool) -> Result<Self> {
        let (scored, config) = (shape.scored(), &shape.config);
        Ok(Head {
            shape: HeadShape {
                rows: 0..scored,
                width: config.hidden_size,
                vocab: config.vocab_size,
                entropy,
                mode,
            },
            batch: batch(device, shape)?,
            objective: shapes::settings()?.objective(shape.pairs),
            weight: compute(device, 2, config.vocab_size * config.hidden_size, 0.05)?,
            pristine: compute(device, 1, scored * config.hidden_size, 1.0)?,
            coefficients: TokenCoefficients {
                logp: floats(device, 3, scored, 1.0)?,
                entropy: floats(device, 4, scored, 1.0)?,
            },
        })
    }

    fn hidden(&self, device: &D) -> Result<ComputeBuffer<D>> {
        let mut hidden = device.alloc(device.len(&self.pristine))?;
        self.restore(device, &mut hidden)?;
        Ok(hidden)
    }

    fn restore(&self, device: &D, hidden: &mut ComputeBuffer<D>) -> Result<()> {
        device.copy(hidden, 0, &self.pristine, 0, device.len(&self.pristine))
    }

    /// The workspace for this many rows at once.
    fn workspace(&self, device: &D, rows: usize) -> Result<ComputeBuffer<D>> {
        let HeadShape { mode, width, vocab, .. } = self.shape;
        device.alloc(device.logp_head_workspace(mode, rows, width, vocab)?)
    }

    /// Runs of whole pairs as a training step takes them: of one size, and as large as the workspace allows.
    fn chunks(&self, device: &D, pairs: usize, most_bytes: usize) -> Result<Vec<Range<usize>>> {
        let HeadShape { mode, width, vocab, .. } = self.shape;
        let mut most = pairs;
        while mode == HeadMode::Main && most > 1 {
            let values = device.logp_head_workspace(mode, most * self.scored() / pairs, width, vocab)?;
            if compute_size::<D>() * values <= most_bytes {
                break;
            }
            most -= 1;
        }
        let even = pairs.div_ceil(pairs.div_ceil(most));
        Ok((0..pairs).step_by(even).map(|first| first..pairs.min(first + even)).collect())
    }

    /// The rows of some of `pairs` pairs.
    fn part(&self, chunk: &Range<usize>, pairs: usize) -> HeadShape {
        let rows_of_pair = self.scored() / pairs;
        HeadShape { rows: chunk.start * rows_of_pair..chunk.end * rows_of_pair, ..self.shape.clone() }
    }

    fn scored(&self) -> usize {
        self.shape.rows.len()
    }

    /// Operations of one gemm with the vocabulary matrix.
    fn gemm_flops(&self) -> usize {
        2 * self.scored() * self.shape.vocab * self.shape.width
    }

    /// Bytes of hidden rows, vocabulary matrix, targets and results; the logits need not be moved at all.
    fn forward_bytes(&self) -> usize {
        let values = (self.scored() + self.shape.vocab) * self.shape.width;
        compute_size::<D>() * values + 3 * WORD * self.scored()
    }

    fn backward_bytes(&self) -> usize {
        let HeadShape { vocab, width, .. } = self.shape;
        let hidden = 2 * compute_size::<D>() * self.scored() * width;
        hidden + (compute_size::<D>() + 2 * WORD) * vocab * width + 3 * WORD * self.scored()
    }

    fn forward(
        &self,
        device: &D,
        scores: &mut TokenScores<D>,
        workspace: &mut ComputeBuffer<D>,
        hidden: &ComputeBuffer<D>,
        shape: &HeadShape,
    ) -> Result<()> {
        device.logp_head_forward(HeadForward {
            scores,
            workspace,
            hidden,
            weight: &self.weight,
            targets: &self.batch.targets,
            shape,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn backward(
        &self,
        device: &D,
        hidden: &mut ComputeBuffer<D>,
        dweight: &mut Floats<D>,
        workspace: &mut ComputeBuffer<D>,
        scores: &TokenScores<D>,
        coefficients: &TokenCoefficients<D>,
        shape: &HeadShape,
    ) -> Result<()> {
        device.logp_head_backward(HeadBackward {
            hidden,
            dweight: Some(dweight),
            workspace,
            weight: &self.weight,
            targets: &self.batch.targets,
            scores,
            coefficients,
            shape,
        })
    }
}

fn head_forward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let head = Head::new(device, shape, HeadMode::Main, false)?;
    let (flops, bytes, scored) = (head.gemm_flops(), head.forward_bytes(), head.scored());
    let (hidden, mut workspace) = (head.hidden(device)?, head.workspace(device, scored)?);
    let mut scores = TokenScores::new(device, scored)?;
    let out = outputs(device, &[], &[scored, scored])?;
    let case = Case::new("logp_head_forward", out, move |device: &D, out| {
        let exchange = |scores: &mut TokenScores<D>, out: &mut super::Outputs<D>| {
            std::mem::swap(&mut scores.lse, &mut out.floats[0]);
            std::mem::swap(&mut scores.logp, &mut out.floats[1]);
        };
        exchange(&mut scores, out);
        head.forward(device, &mut scores, &mut workspace, &hidden, &head.shape)?;
        exchange(&mut scores, out);
        Ok(())
    });
    Ok(case.flops(flops).bytes(bytes))
}

fn head_backward<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let head = std::rc::Rc::new(Head::new(device, shape, HeadMode::Main, false)?);
    let (flops, bytes, scored) = (2 * head.gemm_flops(), head.backward_bytes(), head.scored());
    let workspace = std::rc::Rc::new(std::cell::RefCell::new(head.workspace(device, scored)?));
    let scores = std::rc::Rc::new(std::cell::RefCell::new(TokenScores::new(device, scored)?));
    let out = super::Outputs {
        compute: vec![head.hidden(device)?],
        floats: vec![device.alloc(head.shape.vocab * head.shape.width)?],
    };
    let prepare = {
        let (head, workspace, scores) = (head.clone(), workspace.clone(), scores.clone());
        move |device: &D, out: &mut super::Outputs<D>| {
            head.restore(device, &mut out.compute[0])?;
            let (scores, workspace) = (&mut scores.borrow_mut(), &mut workspace.borrow_mut());
            head.forward(device, scores, workspace, &out.compute[0], &head.shape)
        }
    };
    let case = Case::new("logp_head_backward", out, move |device: &D, out| {
        let (hidden, dweight) = (&mut out.compute[0], &mut out.floats[0]);
        let workspace = &mut workspace.borrow_mut();
        head.backward(device, hidden, dweight, workspace, &scores.borrow(), &head.coefficients, &head.shape)
    });
    Ok(case.prepare(prepare).updates().flops(flops).bytes(bytes))
}

/// The ways in which the head runs forward and backward.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Both {
    Main,
    WithEntropy,
    Recomputed,
    /// Main mode with as large a workspace as one chunk takes.
    InOneChunk,
}

impl Both {
    fn part(self) -> &'static str {
        match self {
            Both::Main => "forward and backward",
            Both::WithEntropy => "forward and backward with entropy",
            Both::Recomputed => "forward and backward recomputed",
            Both::InOneChunk => "forward and backward in one chunk",
        }
    }

    fn mode(self) -> HeadMode {
        if self == Both::Recomputed { HeadMode::Recompute } else { HeadMode::Main }
    }

    /// Bytes that a chunk may take.
    fn workspace<D: Device>(self) -> usize {
        match self {
            Both::InOneChunk => usize::MAX,
            _ => HeadOptions::DEFAULT_WORKSPACE.min(D::HEAD_CHUNK_BYTES),
        }
    }
}

/// Forward, objective and backward: the end of a step, with which the peers' heads are compared.
fn head_both<D: Device>(device: &D, shape: &Shape, both: Both) -> Result<Case<D>> {
    let head = std::rc::Rc::new(Head::new(device, shape, both.mode(), both == Both::WithEntropy)?);
    let flops = 3 * head.gemm_flops();
    let bytes = head.forward_bytes() + head.backward_bytes();
    let (scored, pairs) = (head.scored(), shape.pairs);
    let chunks = head.chunks(device, pairs, both.workspace::<D>())?;
    let largest = chunks.first().map_or(0, |chunk| head.part(chunk, pairs).rows.len());
    let mut workspace = head.workspace(device, largest)?;
    let workspace_bytes = compute_size::<D>() * device.len(&workspace);
    let mut scores = TokenScores::new(device, scored)?;
    let mut coefficients = TokenCoefficients::new(device, scored)?;
    let mut outcomes: Floats<D> = device.alloc(pairs * PairOutcome::WIDTH)?;
    let out = super::Outputs {
        compute: vec![head.hidden(device)?],
        floats: vec![device.alloc(head.shape.vocab * head.shape.width)?],
    };
    let prepare = {
        let head = head.clone();
        move |device: &D, out: &mut super::Outputs<D>| head.restore(device, &mut out.compute[0])
    };
    let case = Case::new("logp_head", out, move |device: &D, out| {
        let (hidden, dweight) = (&mut out.compute[0], &mut out.floats[0]);
        for chunk in &chunks {
            let shape = head.part(chunk, pairs);
            head.forward(device, &mut scores, &mut workspace, hidden, &shape)?;
            device.pair_objective(ObjectiveOperands {
                outcomes: &mut outcomes,
                coefficients: &mut coefficients,
                scores: &scores,
                batch: &head.batch,
                objective: &head.objective,
                pairs: chunk.clone(),
            })?;
            head.backward(device, hidden, dweight, &mut workspace, &scores, &coefficients, &shape)?;
        }
        Ok(())
    });
    let case = case.prepare(prepare).part(both.part()).updates();
    Ok(case.flops(flops).bytes(bytes).workspace(workspace_bytes))
}

fn pair_objective<D: Device>(device: &D, shape: &Shape) -> Result<Case<D>> {
    let (scored, pairs) = (shape.scored(), shape.pairs);
    let batch = batch(device, shape)?;
    let objective = shapes::settings()?.objective(pairs);
    let scores = TokenScores {
        lse: floats(device, 1, scored, 1.0)?,
        logp: floats(device, 2, scored, 1.0)?,
        entropy: floats(device, 3, scored, 1.0)?,
    };
    let mut coefficients = TokenCoefficients::new(device, scored)?;
    let out = outputs(device, &[], &[pairs * PairOutcome::WIDTH, scored])?;
    let case = Case::new("pair_objective", out, move |device: &D, out| {
        let (outcomes, dlogp) = out.floats.split_at_mut(1);
        std::mem::swap(&mut coefficients.logp, &mut dlogp[0]);
        let done = device.pair_objective(ObjectiveOperands {
            outcomes: &mut outcomes[0],
            coefficients: &mut coefficients,
            scores: &scores,
            batch: &batch,
            objective: &objective,
            pairs: 0..pairs,
        });
        std::mem::swap(&mut coefficients.logp, &mut dlogp[0]);
        done
    });
    // Log-probs in; two coefficients per token and the outcomes out.
    Ok(case.bytes(3 * WORD * scored + WORD * pairs * (PairOutcome::WIDTH + 8)))
}
