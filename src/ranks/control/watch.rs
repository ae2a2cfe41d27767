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
        return Some(of_peer(peer, What::Silent(age(seen.heard).as_secs())));
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
