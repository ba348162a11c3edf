//! Which view a process sees: that of its nearest ancestor, itself included, to which one was shown.
//!
//! What was found of a process is kept for as long as the process lives, and its parent is kept as it was when the process
//! was first seen. So a process stays in its view when its parent ends and the system gives it another one, and the number
//! of a process that has ended counts for nothing: each answer first asks whether the number still stands for the same
//! process. What cannot be known is whose child a process was that is first seen after its parent's end.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::ancestry::{Ancestry, Process};

/// Ended processes are looked for when there are this many, and then when twice as many as were left.
const SWEEP_FROM: usize = 1024;

/// How often a search begins anew because processes ended in its course.
const ATTEMPTS: usize = 100;

/// The processes that were seen, and what is shown to them. Views are numbers, of which 0 is none.
#[derive(Debug)]
pub struct Processes<A: Ancestry> {
    ancestry: A,
    /// By number, of a process or a thread.
    known: RwLock<HashMap<u32, Known<A::Watch>>>,
    shown: RwLock<HashMap<Process, u16>>,
    /// Counts the changes of `shown`. What was answered before the last one is not an answer any more.
    generation: AtomicU32,
    sweep_at: AtomicUsize,
}

#[derive(Debug)]
struct Known<W> {
    watch: W,
    kin: Arc<Kin>,
}

/// A process and its ancestors.
#[derive(Debug)]
struct Kin {
    process: Process,
    parent: Option<Arc<Kin>>,
    /// The last answer, and above it the generation of which it was.
    answer: AtomicU64,
}

impl Drop for Kin {
    /// Ancestors go one by one: there may be more of them than a stack is deep.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut kin) = next.and_then(Arc::into_inner) {
            next = kin.parent.take();
        }
    }
}

impl<A: Ancestry> Processes<A> {
    /// Nobody is known and nothing is shown.
    pub fn new(ancestry: A) -> Self {
        Self {
            ancestry,
            known: RwLock::default(),
            shown: RwLock::default(),
            generation: AtomicU32::new(1),
            sweep_at: AtomicUsize::new(SWEEP_FROM),
        }
    }

    /// Shows a view to a process and to all that descend from it and have no nearer one. What it was shown before is no more.
    /// `None`: there is no such process.
    ///
    /// # Errors
    /// The system does not say what the process is.
    pub fn show(&self, pid: u32, view: u16) -> io::Result<Option<Process>> {
        let Some(kin) = self.kin(pid)? else { return Ok(None) };
        write(&self.shown).insert(kin.process, view);
        self.changed();
        Ok(Some(kin.process))
    }

    /// Puts one view in the place of another, for all to whom it was shown.
    pub fn replace(&self, old: u16, new: u16) {
        write(&self.shown).values_mut().filter(|view| **view == old).for_each(|view| *view = new);
        self.changed();
    }

    /// Takes away what was shown to a process itself. Returns that.
    pub fn hide(&self, process: Process) -> Option<u16> {
        let hidden = write(&self.shown).remove(&process);
        self.changed();
        hidden
    }

    /// The view that a process, or a thread of it, sees.
    ///
    /// # Errors
    /// The system does not say what the process is, or whose child.
    pub fn view_of(&self, number: u32) -> io::Result<Option<u16>> {
        if let Some(known) = read(&self.known).get(&number)
            && self.ancestry.lives(number, &known.watch)
        {
            return Ok(self.answer(&known.kin));
        }
        Ok(self.kin(number)?.and_then(|kin| self.answer(&kin)))
    }

    /// The processes to which a view was shown.
    pub fn shown_to(&self, view: u16) -> Vec<Process> {
        let shown = read(&self.shown);
        let mut processes: Vec<Process> =
            shown.iter().filter(|(_, shown)| **shown == view).map(|(process, _)| *process).collect();
        processes.sort_unstable();
        processes
    }

    /// The processes that are known to see a view, and live.
    pub fn seen_in(&self, view: u16) -> Vec<Process> {
        let known = read(&self.known);
        let mut processes: Vec<Process> = known
            .iter()
            .filter(|(number, known)| {
                self.answer(&known.kin) == Some(view) && self.ancestry.lives(**number, &known.watch)
            })
            .map(|(_, known)| known.kin.process)
            .collect();
        processes.sort_unstable();
        processes.dedup();
        processes
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn answer(&self, kin: &Kin) -> Option<u16> {
        let generation = self.generation.load(Ordering::Acquire);
        let last = kin.answer.load(Ordering::Relaxed);
        if (last >> 32) as u32 == generation {
            return Some(last as u16).filter(|view| *view != 0);
        }
        let shown = read(&self.shown);
        let mut here = Some(kin);
        let mut found = None;
        while let Some(kin) = here
            && found.is_none()
        {
            found = shown.get(&kin.process).copied();
            here = kin.parent.as_deref();
        }
        let answer = u64::from(generation) << 32 | u64::from(found.unwrap_or(0));
        kin.answer.store(answer, Ordering::Relaxed);
        found
    }

    /// Who is known under a number, if that still stands for the same.
    fn cached(&self, number: u32) -> Option<Arc<Kin>> {
        let known = read(&self.known);
        let known = known.get(&number).filter(|known| self.ancestry.lives(number, &known.watch))?;
        Some(Arc::clone(&known.kin))
    }

    /// A process by its number or a thread's, with all its ancestors as far as they are not known yet.
    fn kin(&self, number: u32) -> io::Result<Option<Arc<Kin>>> {
        'anew: for _ in 0..ATTEMPTS {
            // From the process upwards, as far as nobody is known.
            let mut found = Vec::new();
            let mut at = number;
            let mut above = loop {
                if let Some(kin) = self.cached(at) {
                    break Some(kin);
                }
                let Some(here) = self.ancestry.find(at)? else {
                    if found.is_empty() {
                        return Ok(None);
                    }
                    continue 'anew;
                };
                let next = if here.process.pid == at { here.parent } else { here.process.pid };
                found.push((at, here));
                if next == 0 {
                    break None;
                }
                at = next;
            };
            // Whoever still has the parent that was found under the number, is that one's child: a parent's number is given
            // to nobody else before its children have got another one.
            for (number, was) in &found {
                match self.ancestry.find(*number)? {
                    Some(is) if (is.process, is.parent) == (was.process, was.parent) => {}
                    _ => continue 'anew,
                }
            }
            let mut known = write(&self.known);
            for (number, here) in found.into_iter().rev() {
                let kin = match above {
                    // A thread is its process.
                    Some(process) if here.process.pid != number => process,
                    parent => Arc::new(Kin { process: here.process, parent, answer: AtomicU64::new(0) }),
                };
                known.insert(number, Known { watch: here.watch, kin: Arc::clone(&kin) });
                above = Some(kin);
            }
            self.sweep(&mut known);
            return Ok(above);
        }
        Err(io::Error::other(format!("the ancestors of process {number} end faster than they can be found")))
    }

    /// Lets those go that have ended. Who descends from them keeps them.
    fn sweep(&self, known: &mut HashMap<u32, Known<A::Watch>>) {
        if known.len() >= self.sweep_at.load(Ordering::Relaxed) {
            known.retain(|number, known| self.ancestry.lives(*number, &known.watch));
            self.sweep_at.store((2 * known.len()).max(SWEEP_FROM), Ordering::Relaxed);
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::router::ancestry::Found;

    /// Processes as a test wants them: what ends when cannot be had from a system.
    #[derive(Debug, Default)]
    struct Told(Mutex<HashMap<u32, (u64, u32)>>);

    impl Told {
        fn start(&self, pid: u32, start: u64, parent: u32) {
            self.0.lock().unwrap().insert(pid, (start, parent));
        }

        /// Its children become init's, as everywhere.
        fn end(&self, pid: u32) {
            let mut all = self.0.lock().unwrap();
            all.remove(&pid);
            all.values_mut().filter(|(_, parent)| *parent == pid).for_each(|(_, parent)| *parent = 1);
        }
    }

    impl Ancestry for &Told {
        type Watch = u64;

        fn find(&self, number: u32) -> io::Result<Option<Found<u64>>> {
            let found = self.0.lock().unwrap().get(&number).copied();
            Ok(found.map(|(start, parent)| Found {
                process: Process { pid: number, start },
                parent,
                watch: start,
            }))
        }

        fn lives(&self, number: u32, watch: &u64) -> bool {
            self.0.lock().unwrap().get(&number).is_some_and(|(start, _)| start == watch)
        }
    }

    /// 1 has 10 and 50; 10 has 11, that has 12, and that 13.
    fn family() -> Told {
        let told = Told::default();
        for (pid, parent) in [(1, 0), (10, 1), (11, 10), (12, 11), (13, 12), (50, 1)] {
            told.start(pid, u64::from(pid) * 100, parent);
        }
        told
    }

    #[test]
    fn the_nearest_ancestor_with_a_view_decides() {
        let told = family();
        let processes = Processes::new(&told);
        let all = || [1, 10, 11, 12, 13, 50, 99].map(|pid| processes.view_of(pid).unwrap().unwrap_or(0));
        assert_eq!(all(), [0; 7]);
        let outer = processes.show(10, 7).unwrap().unwrap();
        assert_eq!(all(), [0, 7, 7, 7, 7, 0, 0]);
        let inner = processes.show(12, 8).unwrap().unwrap();
        assert_eq!(all(), [0, 7, 7, 8, 8, 0, 0]);
        assert_eq!(processes.shown_to(8), [inner]);
        assert_eq!(processes.seen_in(8), [inner, Process { pid: 13, start: 1300 }]);
        processes.replace(8, 9);
        assert_eq!(all(), [0, 7, 7, 9, 9, 0, 0]);
        assert_eq!(processes.hide(outer), Some(7));
        assert_eq!(all(), [0, 0, 0, 9, 9, 0, 0]);
        assert_eq!(processes.hide(inner), Some(9));
        assert_eq!((all(), processes.hide(inner)), ([0; 7], None));
        assert_eq!(processes.show(99, 1).unwrap(), None);
    }

    #[test]
    fn who_was_seen_stays_in_its_view_when_its_ancestors_end() {
        let told = family();
        let processes = Processes::new(&told);
        processes.show(11, 7).unwrap();
        assert_eq!(processes.view_of(13).unwrap(), Some(7));
        told.end(12);
        told.end(11);
        // Its ancestors are not asked for anew, also when something else has changed.
        processes.show(50, 8).unwrap();
        assert_eq!(processes.view_of(13).unwrap(), Some(7));
        assert_eq!(processes.seen_in(7).len(), 1);
        // Who was never seen before is init's.
        told.start(14, 1400, 1);
        assert_eq!(processes.view_of(14).unwrap(), None);
        // What it starts from now on is its child.
        told.start(15, 1500, 13);
        assert_eq!(processes.view_of(15).unwrap(), Some(7));
        told.end(13);
        told.end(15);
        assert_eq!(processes.seen_in(7), []);
    }

    #[test]
    fn a_number_that_was_given_again_is_another_process() {
        let told = family();
        let processes = Processes::new(&told);
        processes.show(12, 7).unwrap();
        assert_eq!(processes.view_of(13).unwrap(), Some(7));
        told.end(13);
        told.start(13, 9000, 50);
        assert_eq!(processes.view_of(13).unwrap(), None);
        told.end(12);
        told.start(12, 9001, 1);
        assert_eq!(processes.view_of(12).unwrap(), None);
        told.start(14, 9002, 12);
        assert_eq!(processes.view_of(14).unwrap(), None);
    }

    #[test]
    fn those_that_have_ended_are_let_go_however_many_there_were() {
        let told = family();
        let processes = Processes::new(&told);
        processes.show(10, 7).unwrap();
        for number in 0..10_000_u64 {
            let pid = 100 + number as u32;
            told.start(pid, number, 11);
            assert_eq!(processes.view_of(pid).unwrap(), Some(7));
            told.end(pid);
        }
        assert!(read(&processes.known).len() < 2 * SWEEP_FROM);
        // A line of descent that is longer than a stack.
        for pid in 20_000..220_000 {
            told.start(pid, 1, if pid == 20_000 { 10 } else { pid - 1 });
        }
        assert_eq!(processes.view_of(219_999).unwrap(), Some(7));
        drop(processes);
    }

    #[test]
    fn a_thread_is_its_process() {
        #[cfg(target_os = "linux")]
        {
            let processes = Processes::new(super::super::ancestry::Host);
            processes.show(std::process::id(), 3).unwrap();
            let own = || rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            let thread =
                std::thread::scope(|scope| scope.spawn(|| processes.view_of(own()).unwrap()).join().unwrap());
            assert_eq!((thread, processes.view_of(own()).unwrap()), (Some(3), Some(3)));
            assert_eq!(processes.seen_in(3).len(), 1);
        }
    }
}
