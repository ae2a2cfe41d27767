//! What each rank of a run did, for the report.

use super::trainer::RankStep;
use crate::report::RankFacts;

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

#[cfg(test)]
mod tests {
    use super::*;

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
