//! What each rank of a run did, for the report.

use super::trainer::RankStep;
use crate::report::{RankFacts, RankMetrics};

/// Sums over the steps of this process, by rank; nothing in a run of one.
#[derive(Debug, Default)]
pub struct RankShares(Vec<RankStep>);

impl RankShares {
    /// Adds a step.
    pub fn add(&mut self, step: &[RankStep]) {
        self.0.resize(step.len(), RankStep::default());
        for (sum, part) in self.0.iter_mut().zip(step) {
            sum.tokens += part.tokens;
            sum.busy_seconds += part.busy_seconds;
            sum.waited_seconds += part.waited_seconds;
        }
    }

    /// The ranks as the report shows them; `hosts` are their machines.
    pub fn facts(&self, hosts: &[String]) -> Vec<RankFacts> {
        let ranks = self.0.iter().zip(hosts);
        ranks
            .map(|(rank, host)| RankFacts {
                host: host.clone(),
                tokens: rank.tokens,
                busy_seconds: rank.busy_seconds,
                waited_seconds: rank.waited_seconds,
            })
            .collect()
    }
}

/// How evenly the ranks worked in a step; `None` where there is one.
pub fn metrics(ranks: &[RankStep]) -> Option<RankMetrics> {
    let busiest = |one: &&RankStep, other: &&RankStep| one.busy_seconds.total_cmp(&other.busy_seconds);
    let share = |rank: &RankStep| {
        rank.waited_seconds / (rank.busy_seconds + rank.waited_seconds).max(f64::MIN_POSITIVE)
    };
    let (slowest, _) = ranks.iter().enumerate().max_by(|(_, one), (_, other)| busiest(one, other))?;
    Some(RankMetrics {
        waited: ranks.iter().map(share).sum::<f64>() / ranks.len() as f64,
        waited_most: ranks.iter().map(share).fold(0.0, f64::max),
        slowest: slowest as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_rank_is_the_one_that_the_others_wait_for() {
        assert_eq!(metrics(&[]), None);
        let part = |busy_seconds, waited_seconds| RankStep { tokens: 1, busy_seconds, waited_seconds };
        let found = metrics(&[part(3.0, 1.0), part(4.0, 0.0), part(1.0, 3.0)]).unwrap();
        assert_eq!((found.waited_most, found.slowest), (0.75, 1.0));
        assert!((found.waited - 1.0 / 3.0).abs() <= 1e-12, "{found:?}");
    }

    #[test]
    fn steps_are_summed_by_rank() {
        let part = |tokens, waited_seconds| RankStep { tokens, busy_seconds: 1.0, waited_seconds };
        let mut shares = RankShares::default();
        assert!(shares.facts(&["a".to_string()]).is_empty());
        shares.add(&[part(10, 0.0), part(7, 0.5)]);
        shares.add(&[part(1, 0.0), part(2, 0.25)]);
        let facts = shares.facts(&["a".to_string(), "b".to_string()]);
        let shown: Vec<_> =
            facts.iter().map(|rank| (rank.host.as_str(), rank.tokens, rank.waited_seconds)).collect();
        assert_eq!(shown, [("a", 11, 0.0), ("b", 9, 0.75)]);
    }
}
