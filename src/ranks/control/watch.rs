//! The thread that gives signs of life, and that looks at those of the others.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{Line, Shared, State};
use crate::ranks::host;
use crate::ranks::messages::Message;
use crate::ranks::progress::{self, Position, Progress};
use crate::ranks::verdict::{Verdict, What};

/// Time between two signs of life.
const PERIOD: Duration = Duration::from_secs(1);

/// This rank's own progress, as rank 0 judges it.
struct Own {
    progress: Progress,
    advanced: Instant,
}

/// Runs until the control line is no longer used.
pub fn run(shared: &Weak<Shared>) {
    let mut own = Own { progress: progress::now(), advanced: Instant::now() };
    let mut last = Instant::now();
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let period = PERIOD.min(shared.limits.silence() / 5);
        let now = Instant::now();
        // This process, or its whole machine, was stopped: nobody else is to blame for what was not heard meanwhile.
        if now.duration_since(last) > 5 * period {
            forgive(&mut shared.lock(), &mut own, now);
        }
        last = now;
        let progress = progress::now();
        if progress != own.progress {
            own = Own { progress, advanced: now };
        }
        shared.send_to_all(&Message::Alive(progress));
        if let Some(verdict) = look(&shared, &own, now) {
            shared.judge(verdict);
        }
        let is_over = shared.lock().seen.iter().all(|seen| seen.line == Line::Closed);
        drop(shared);
        if is_over {
            return;
        }
        std::thread::sleep(period);
    }
}

fn forgive(state: &mut State, own: &mut Own, now: Instant) {
    own.advanced = now;
    for seen in &mut state.seen {
        (seen.heard, seen.advanced) = (now, now);
    }
}

/// Who is lost, if somebody is.
fn look(shared: &Arc<Shared>, own: &Own, now: Instant) -> Option<Verdict> {
    let state = shared.lock();
    if state.verdict.is_some() || state.is_ending {
        return None;
    }
    let limits = shared.limits;
    let age = |since: Instant| now.saturating_duration_since(since);
    let of_peer = |peer: usize, what: What| {
        let (who, seen) = (&shared.peers[peer], &state.seen[peer]);
        Verdict { rank: who.rank, host: who.host.clone(), position: seen.progress.position, what }
    };
    let open = || state.seen.iter().enumerate().filter(|(_, seen)| seen.line == Line::Open);
    let silent = open().max_by_key(|(_, seen)| age(seen.heard));
    if let Some((peer, seen)) = silent.filter(|(_, seen)| age(seen.heard) > limits.silence()) {
        // What was heard of it is old, and ranks go through the steps together.
        let position = seen.progress.position.max(own.progress.position);
        return Some(Verdict { position, ..of_peer(peer, What::Silent(age(seen.heard).as_secs())) });
    }
    if shared.rank != 0 {
        return None;
    }
    let all = || {
        let peers = open().map(|(peer, seen)| (Some(peer), seen.progress.position, age(seen.advanced)));
        std::iter::once((None, own.progress.position, age(own.advanced))).chain(peers)
    };
    let farthest = all().map(|(_, position, _)| position).max()?;
    let (who, position, idle) =
        all().min_by_key(|&(_, position, idle)| (position, std::cmp::Reverse(idle)))?;
    let is_idle = |position: Position, idle: Duration| idle > limits.hang * position.patience();
    let what = match is_idle(position, idle) {
        true if position < farthest => What::Hangs(idle.as_secs()),
        true if position.step() > 0 && all().all(|(_, position, idle)| is_idle(position, idle)) => {
            What::AllHang(idle.as_secs())
        }
        _ => return None,
    };
    Some(match who {
        Some(peer) => of_peer(peer, what),
        None => Verdict { rank: 0, host: host(), position, what },
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::sync::{Condvar, Mutex};

    use super::super::{Limits, Peer, Seen};
    use super::*;
    use crate::ranks::progress::Stage;

    const LIMITS: Limits = Limits { join: Duration::from_secs(1), hang: Duration::from_secs(600) };

    /// A rank as rank 0 sees it: where it is, how long it has done nothing, and how long nothing was heard of it, in seconds.
    type Known = (Position, u64, u64);

    /// What `rank` says of the others, of itself in `own`, and of nobody else.
    fn judged(rank: usize, own: Known, others: &[Known]) -> Option<(usize, What)> {
        judged_in(State::default(), rank, own, others).map(|verdict| (verdict.rank, verdict.what))
    }

    /// As `judged`, where the rank's own state is this one.
    fn judged_in(state: State, rank: usize, own: Known, others: &[Known]) -> Option<Verdict> {
        judged_on(Line::Open, state, rank, own, others)
    }

    /// As `judged_in`, where the connections with the others are in this state.
    fn judged_on(line: Line, state: State, rank: usize, own: Known, others: &[Known]) -> Option<Verdict> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let now = Instant::now() + Duration::from_secs(10_000);
        let ago = |seconds| now - Duration::from_secs(seconds);
        let progress = |position| Progress { position, ticks: 0 };
        let peer = |number| Peer {
            rank: if rank == 0 { number + 1 } else { 0 },
            host: "there".to_string(),
            stream: Mutex::new(TcpStream::connect(address).unwrap()),
        };
        let seen = |&(position, idle, silent): &Known| Seen {
            heard: ago(silent),
            progress: progress(position),
            advanced: ago(idle),
            line,
        };
        let state = State {
            inbox: others.iter().map(|_| VecDeque::new()).collect(),
            seen: others.iter().map(seen).collect(),
            ..state
        };
        let shared = Arc::new(Shared {
            rank,
            limits: LIMITS,
            peers: (0..others.len()).map(peer).collect(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let own = Own { progress: progress(own.0), advanced: ago(own.1) };
        look(&shared, &own, now)
    }

    fn in_step(step: usize) -> Position {
        Position::new(Stage::Step, step)
    }

    #[test]
    fn who_does_nothing_while_others_wait_hangs() {
        let waits = (in_step(17).waiting(), 601, 0);
        let works = (in_step(17), 601, 0);
        assert_eq!(judged(0, waits, &[waits, works]), Some((2, What::Hangs(601))));
        assert_eq!(judged(0, works, &[waits, waits]), Some((0, What::Hangs(601))));
        // A rank that others do not wait for, a step that goes on, and the first seconds of one that does not.
        assert_eq!(judged(0, (in_step(17), 5, 0), &[works, works]), None);
        assert_eq!(judged(0, waits, &[waits, (in_step(17), 1, 0)]), None);
        assert_eq!(judged(0, waits, &[waits, (in_step(17), 600, 0)]), None);
        // Between two, the one with the smaller place.
        assert_eq!(judged(0, waits, &[works, (in_step(16), 900, 0)]), Some((2, What::Hangs(900))));
        // At the same place, the one that has done nothing for longer.
        let longer = (works.0, 900, 0);
        assert_eq!(judged(0, waits, &[works, longer]), Some((2, What::Hangs(900))));
        assert_eq!(judged(0, waits, &[longer, works]), Some((1, What::Hangs(900))));
    }

    #[test]
    fn slow_work_with_files_has_longer() {
        let waits = (Position::new(Stage::Saving, 17).waiting(), 700, 0);
        for stage in [Stage::Saving, Stage::Inputs, Stage::Model, Stage::End] {
            let slow = |idle| (Position::new(stage, 17), idle, 0);
            let ahead = (Position::new(Stage::End, 18), 1, 0);
            assert_eq!(judged(0, ahead, &[waits, slow(3600)]), None, "{stage:?}");
            assert_eq!(judged(0, ahead, &[ahead, slow(3601)]), Some((2, What::Hangs(3601))), "{stage:?}");
        }
    }

    #[test]
    fn where_all_wait_for_each_other_all_hang() {
        let waits = (in_step(17).waiting(), 601, 0);
        let found = judged(0, waits, &[waits, waits]).unwrap();
        assert_eq!(found.1, What::AllHang(601));
        assert_eq!(judged(0, (waits.0, 1, 0), &[waits, waits]), None);
    }

    #[test]
    fn who_knows_what_happened_or_ends_looks_for_nothing_else() {
        let (well, silent) = ((in_step(5), 0, 0), (in_step(3), 61, 61));
        let found = judged_in(State::default(), 0, well, &[silent]).unwrap();
        assert_eq!(found.position, in_step(5), "ranks go through the steps together");
        assert_eq!(judged_in(State { is_ending: true, ..State::default() }, 0, well, &[silent]), None);
        let known = State { verdict: Some(found), ..State::default() };
        assert_eq!(judged_in(known, 0, well, &[silent]), None);
    }

    /// Some ranks end before others.
    #[test]
    fn who_has_said_goodbye_is_not_judged() {
        let (well, ended) = ((in_step(5), 0, 0), (in_step(3), 700, 700));
        for line in [Line::Farewell, Line::Closed] {
            assert_eq!(judged_on(line, State::default(), 0, well, &[ended]), None, "{line:?}");
            assert_eq!(judged_on(line, State::default(), 1, well, &[ended]), None, "{line:?}");
        }
    }

    #[test]
    fn silence_is_an_end_for_every_rank() {
        let well = (in_step(3), 0, 0);
        let silent = (in_step(3), 61, 61);
        assert_eq!(judged(0, well, &[well, silent]), Some((2, What::Silent(61))));
        assert_eq!(judged(5, well, &[silent]), Some((0, What::Silent(61))));
        assert_eq!(judged(5, well, &[(in_step(3), 60, 60)]), None);
        // Whether rank 0 hangs is for rank 0 to say, whose word comes as long as it is not silent.
        assert_eq!(judged(5, (in_step(4), 0, 0), &[(in_step(1), 5000, 0)]), None);
    }
}
