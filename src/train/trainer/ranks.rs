//! A trainer among the ranks of a run: what it sums over them, and in which order.
//!
//! Every collective is queued where the computation before it has been recorded, and nothing but the collectives' own queue waits
//! for it until its result is read. So the gradients of a layer are on their way while the backward of the layers below runs.
//!
//! A step sums two things: the gradients, and the `metrics` buffer, in which each rank has a row of its own and the outcomes of
//! its own pairs, and zeros everywhere else. After that all ranks hold the same numbers, and come to the same decisions.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{GradientConfig, MemoryConfig, OffloadConfig, ShardConfig};
use crate::device::{Device, Element, Floats, GroupPlace, Indices, MemoryPart, Queue};
use crate::error::{Error, Result};
use crate::model::{CompleteLayer, GradientSink};
use crate::ranks::{RankGroup, progress};
use crate::train::cut::Cut;

/// Values of a rank's row in the metrics: the norm of its gradients, its tokens, its seconds of work, and whether it asks to stop.
pub(super) const ROW: usize = 4;

/// One rank's part of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankStep {
    /// Tokens that it took through the model.
    pub tokens: usize,
    /// Seconds from the start of the step until its own gradients were complete, without those that its host spent in calls of
    /// collectives. Where gradients or weights are sharded, the backward itself waits for the other ranks, and these seconds count
    /// here too.
    pub busy_seconds: f64,
    /// The rest of the seconds until all ranks had the sums: it waited for the others, or for the network.
    pub waited_seconds: f64,
}

/// The other ranks, as the trainer of one of them reaches them.
#[derive(Debug)]
pub(super) struct OtherRanks<D: Device> {
    group: RankGroup<D>,
    pub shard: ShardConfig,
    /// What a collective reads is complete.
    ready: D::Event,
    /// The last collective is over.
    done: D::Event,
    /// `[ranks]`: a word of each rank.
    words: Indices<D>,
    started: Instant,
    in_calls: Duration,
}

impl<D: Device> OtherRanks<D> {
    /// `None` for a run of one rank, which has nobody to talk to.
    ///
    /// # Errors
    /// [`Error::Config`] for options that several ranks do not have; those of the device.
    pub fn new(group: Option<RankGroup<D>>, memory: &MemoryConfig) -> Result<Option<Self>> {
        let Some(group) = group.filter(|group| group.place().ranks > 1) else { return Ok(None) };
        check(memory)?;
        let (ready, done) = (group.device.new_event()?, group.device.new_event()?);
        let shard = memory.shard;
        let (started, in_calls) = (Instant::now(), Duration::ZERO);
        let words = group.device.as_part(MemoryPart::Batch, || group.device.alloc(group.place().ranks))?;
        Ok(Some(OtherRanks { group, shard, ready, done, words, started, in_calls }))
    }

    pub fn device(&self) -> &D {
        &self.group.device
    }

    pub fn place(&self) -> GroupPlace {
        self.group.place()
    }

    /// Values before the outcomes in the metrics.
    pub fn rows(&self) -> usize {
        ROW * self.place().ranks
    }

    /// The values of a tensor of `len` values whose sums and states this rank has.
    pub fn own(&self, len: usize) -> Range<usize> {
        match self.shard {
            ShardConfig::None => 0..len,
            _ => Cut::new(len, self.place()).own(),
        }
    }

    /// Begins to count the seconds of a step.
    pub fn begin_step(&mut self) {
        (self.started, self.in_calls) = (Instant::now(), Duration::ZERO);
    }

    /// Seconds of the step so far, and those of them that were not spent in calls of collectives.
    pub fn seconds(&self) -> (f64, f64) {
        let all = self.started.elapsed();
        (all.as_secs_f64(), all.saturating_sub(self.in_calls).as_secs_f64())
    }

    /// Queues the sums of `gradients`, after the work that the device was given so far: of all their values on every rank, or
    /// where states are sharded, of each rank's own values there.
    ///
    /// # Errors
    /// Those of the device and of the other ranks.
    pub fn sum_gradients(&mut self, gradients: &mut [&mut Floats<D>]) -> Result<()> {
        let (shard, place) = (self.shard, self.place());
        self.queue(|group| {
            let (device, communicator) = (&*group.device, &group.communicator);
            device.grouped(communicator, &mut || {
                for gradient in gradients.iter_mut() {
                    let len = device.len(gradient);
                    if shard == ShardConfig::None {
                        device.all_reduce(communicator, gradient, 0..len)?;
                        continue;
                    }
                    let cut = Cut::new(len, place);
                    if !cut.body().is_empty() {
                        device.reduce_scatter(communicator, gradient, cut.body())?;
                    }
                    if !cut.tail().is_empty() {
                        device.reduce(communicator, gradient, cut.tail(), cut.last_rank())?;
                    }
                }
                Ok(())
            })
        })
    }

    /// Queues the exchange of whole tensors, of which each rank has its own values.
    ///
    /// # Errors
    /// As [`OtherRanks::sum_gradients`].
    pub fn gather<T: Element>(&mut self, weights: &mut [&mut D::Buffer<T>]) -> Result<()> {
        let place = self.place();
        self.queue(|group| {
            let (device, communicator) = (&*group.device, &group.communicator);
            device.grouped(communicator, &mut || {
                for weight in weights.iter_mut() {
                    let cut = Cut::new(device.len(weight), place);
                    if !cut.body().is_empty() {
                        device.all_gather(communicator, weight, cut.body())?;
                    }
                    if !cut.tail().is_empty() {
                        device.broadcast(communicator, weight, cut.tail(), cut.last_rank())?;
                    }
                }
                Ok(())
            })
        })
    }

    /// Queues the sum of the first `values` metrics, and lets the device wait for it.
    ///
    /// # Errors
    /// As [`OtherRanks::sum_gradients`].
    pub fn sum_metrics(&mut self, metrics: &mut Floats<D>, values: usize) -> Result<()> {
        self.queue(|group| group.device.all_reduce(&group.communicator, metrics, 0..values))?;
        self.finish()
    }

    /// Gives every rank a word of this one, and waits for theirs: in the order of the ranks.
    ///
    /// # Errors
    /// As [`OtherRanks::sum_gradients`].
    pub fn exchange(&mut self, word: u32) -> Result<Vec<u32>> {
        let _waiting = progress::wait();
        let place = self.place();
        let device = Arc::clone(&self.group.device);
        device.upload(&mut self.words, place.rank, &[word])?;
        device.record(&mut self.ready, Queue::Compute)?;
        device.wait(Queue::Collectives, &self.ready)?;
        device.all_gather(&self.group.communicator, &mut self.words, 0..place.ranks)?;
        device.record(&mut self.done, Queue::Collectives)?;
        self.finish()?;
        let mut found = vec![0; place.ranks];
        device.download(&mut found, &self.words, 0)?;
        Ok(found)
    }

    /// Lets the device's computation wait for all collectives so far.
    ///
    /// # Errors
    /// Those of the device.
    pub fn finish(&self) -> Result<()> {
        self.group.device.wait(Queue::Compute, &self.done)
    }

    /// Calls `work`, whose collectives come after the computation so far, and records their end.
    fn queue(&mut self, work: impl FnOnce(&RankGroup<D>) -> Result<()>) -> Result<()> {
        let _waiting = progress::wait();
        let started = Instant::now();
        let device = &*self.group.device;
        device.record(&mut self.ready, Queue::Compute)?;
        device.wait(Queue::Collectives, &self.ready)?;
        work(&self.group)?;
        device.record(&mut self.done, Queue::Collectives)?;
        self.in_calls += started.elapsed();
        Ok(())
    }
}

/// Refuses what several ranks cannot do together.
fn check(memory: &MemoryConfig) -> Result<()> {
    if memory.gradients == GradientConfig::Layer {
        return Err(Error::config(
            "`gradients` = layer is for one rank: it updates each layer inside the backward, before the other ranks' gradients \
             are there",
            "give --gradients f32 with --shard gradients, which keeps the gradients of two layers at a time",
        ));
    }
    if memory.gradients == GradientConfig::Bf16 {
        return Err(Error::config(
            "`gradients` = bf16 is for one rank: several ranks sum their gradients in f32",
            "give --gradients f32 with --shard gradients, which cuts the sums among the ranks",
        ));
    }
    if memory.offload == OffloadConfig::States && memory.shard != ShardConfig::None {
        return Err(Error::config(
            "optimiser states that are sharded among ranks cannot be offloaded as well",
            "give --offload none, or --shard none",
        ));
    }
    Ok(())
}

/// Sums each layer's gradients as soon as they are complete.
pub(super) struct SumLayers<'a, D: Device> {
    pub ranks: &'a mut OtherRanks<D>,
}

impl<D: Device> GradientSink<D> for SumLayers<'_, D> {
    fn layer_complete(&mut self, layer: CompleteLayer<'_, D>) -> Result<()> {
        self.ranks.sum_gradients(&mut layer.gradients.iter_mut().flatten().collect::<Vec<_>>())
    }
}
