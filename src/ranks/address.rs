//! Where rank 0 listens for the others, and the port that is used for that.

use std::fmt;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Name or number of the machine of rank 0.
    pub host: String,
    /// Its port for the control line.
    pub port: u16,
}

impl Address {
    /// This machine, for ranks that are all on it.
    pub const LOOPBACK: &'static str = "127.0.0.1";
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.host, self.port)
    }
}

/// Ports below those that Linux gives to outgoing connections, one of which a job takes by its name.
const JOB_PORTS: std::ops::Range<u16> = 20000..30000;

/// The port after `port`, which belongs to torchrun's store; the one before the last port.
pub fn after(port: u16) -> u16 {
    port.checked_add(1).unwrap_or(port - 1)
}

/// A port for the job of this name: the same on all its ranks, and rarely that of another job.
pub fn of_job(job: &str) -> u16 {
    let hash = blake3::hash(job.as_bytes());
    let number = hash.as_bytes().first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes));
    let count = u64::from(JOB_PORTS.end - JOB_PORTS.start);
    JOB_PORTS.start + u16::try_from(number % count).unwrap_or(0)
}

/// The first host of a Slurm node list: `node01` of `node[01-04,07],gpu3`.
pub fn first_host(list: &str) -> Option<String> {
    let (prefix, rest) = match list.find(['[', ',']) {
        None => (list, ""),
        Some(at) => list.split_at(at),
    };
    let host = match rest.strip_prefix('[') {
        None => prefix.to_string(),
        Some(rest) => {
            let (numbers, after) = rest.split_once(']')?;
            let first = numbers.split([',', '-']).next()?;
            // Whatever comes between this bracket and the next host belongs to the name: a second bracket, or a domain.
            let after = after.split(',').next()?;
            match after.contains('[') {
                true => format!("{prefix}{first}{}", first_host(after)?),
                false => format!("{prefix}{first}{after}"),
            }
        }
    };
    (!host.is_empty()).then_some(host)
}

/// Tasks of node `node` by Slurm's list of tasks per node: 3 for node 2 of `4(x2),3`.
pub fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0_usize;
    for part in list.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            None => (part, 1),
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
        };
        before = before.saturating_add(nodes);
        if node < before {
            return tasks.trim().parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        let cases = [
            ("node7", "node7"),
            ("gpu3,node[01-04]", "gpu3"),
            ("node[01-04,07],gpu3", "node01"),
            ("node[5,7]", "node5"),
            ("rack[1-2]-node[03-04]", "rack1-node03"),
            ("node[1-2].cluster,other", "node1.cluster"),
        ];
        for (list, first) in cases {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        for broken in ["", "node[1-2", ",node"] {
            assert_eq!(first_host(broken), None, "{broken}");
        }
    }

    #[test]
    fn tasks_of_a_node() {
        for (list, node, tasks) in [
            ("4", 0, 4),
            ("4(x2),3", 1, 4),
            ("4(x2),3", 2, 3),
            ("1,8(x3)", 3, 8),
            ("2,4(x18446744073709551615)", 1, 4),
        ] {
            assert_eq!(tasks_of_node(list, node), Some(tasks), "{list}, node {node}");
        }
        for (list, node) in [("4(x2),3", 3), ("", 0), ("4(y2)", 0), ("many", 0)] {
            assert_eq!(tasks_of_node(list, node), None, "{list}, node {node}");
        }
    }

    #[test]
    fn a_port_of_ours_is_never_the_stores() {
        assert_eq!([after(29500), after(65535)], [29501, 65534]);
        let [one, other] = ["slurm 17.0", "slurm 18.0"].map(of_job);
        assert!(JOB_PORTS.contains(&one) && JOB_PORTS.contains(&other) && one != other, "{one}, {other}");
    }
}
