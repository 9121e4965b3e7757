//! Threads that share the pieces of one job at a time.
//!
//! Pieces are small and taken from a counter as threads come, so a thread that the kernel has put
//! aside costs what it had in hand and no more; the caller works too, and never waits for a thread
//! that has taken nothing. Between jobs threads spin for a moment (a step is some hundred jobs with
//! microseconds between them), then sleep.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::{self, JoinHandle, Thread};

/// Rounds in which a thread looks for the next job before it sleeps: some 50 us.
const IDLE_SPINS: u32 = 1_500;
/// Rounds in which the caller looks whether the last pieces are done before it sleeps: some 10 us.
const WAIT_SPINS: u32 = 300;

/// A job: called with the number of a piece.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// Number of the job (high half) and its next piece (low half). One word, so that whoever takes a
/// piece knows that it is of the job whose fields he has read.
struct Ticket;

impl Ticket {
    fn of(job: u32, piece: u32) -> u64 {
        u64::from(job) << 32 | u64::from(piece)
    }

    fn job(ticket: u64) -> u32 {
        (ticket >> 32) as u32
    }

    fn piece(ticket: u64) -> u32 {
        ticket as u32
    }
}

#[derive(Default)]
struct Shared {
    ticket: AtomicU64,
    pieces: AtomicU32,
    /// Points to a `&Work` in the caller's frame. Only read by who holds a piece of the job.
    work: AtomicPtr<()>,
    finished: AtomicU32,
    panicked: AtomicBool,
    /// The caller sleeps until all pieces are finished.
    caller_sleeps: AtomicBool,
    caller: Mutex<Option<Thread>>,
    ends: AtomicBool,
}

impl Shared {
    /// Works on pieces of job number `job` until none is left.
    fn help(&self, job: u32) {
        let mut ticket = self.ticket.load(Ordering::SeqCst);
        loop {
            let pieces = self.pieces.load(Ordering::SeqCst);
            let work = self.work.load(Ordering::SeqCst);
            if Ticket::job(ticket) != job || Ticket::piece(ticket) >= pieces {
                return;
            }
            if let Err(now) = self.ticket.compare_exchange_weak(ticket, ticket + 1, Ordering::SeqCst, Ordering::SeqCst)
            {
                ticket = now;
                continue;
            }
            // The ticket was still of this job when it was taken, so `pieces` and `work` are of it: they
            // change only between jobs, and the next one begins when this piece is finished.
            let piece = Ticket::piece(ticket) as usize;
            // SAFETY: `run` keeps what `work` points to until `finished` has reached `pieces`, which
            // needs the piece that this thread has taken and not yet finished.
            let work: &Work<'_> = unsafe { *work.cast::<&Work<'_>>() };
            if catch_unwind(AssertUnwindSafe(|| work(piece))).is_err() {
                self.panicked.store(true, Ordering::SeqCst);
            }
            if self.finished.fetch_add(1, Ordering::SeqCst) + 1 == pieces
                && self.caller_sleeps.swap(false, Ordering::SeqCst)
            {
                let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(caller) = caller {
                    caller.unpark();
                }
            }
            ticket = self.ticket.load(Ordering::SeqCst);
        }
    }
}

/// One of the pool's own threads.
struct Helper {
    sleeps: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// The threads. The caller is one of them, so one of `size` has `size - 1` of its own.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<Helper>,
    job: Mutex<u32>,
}

impl Pool {
    /// size: threads that work on a job, at least 1, the caller included.
    pub fn new(size: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helpers = (1..size)
            .map_while(|number| {
                let (shared, sleeps) = (Arc::clone(&shared), Arc::new(AtomicBool::new(false)));
                let flag = Arc::clone(&sleeps);
                let builder = thread::Builder::new().name(format!("octavo-cpu-{number}"));
                // Where no thread is to be had the others do its work.
                let thread = builder.spawn(move || attend(&shared, &flag)).ok()?;
                Some(Helper { sleeps, thread })
            })
            .collect();
        Self { shared, helpers, job: Mutex::new(0) }
    }

    /// Threads that work on a job.
    pub fn size(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work` with every number below `pieces`, on all threads; returns when all have
    /// returned. A call while another thread's job runs does its work alone.
    ///
    /// # Panics
    /// Where `work` has panicked.
    pub fn run(&self, pieces: usize, work: &Work<'_>) {
        let alone = || (0..pieces).for_each(work);
        if self.helpers.is_empty() || pieces < 2 || pieces >= u32::MAX as usize {
            return alone();
        }
        let Ok(mut job) = self.job.try_lock() else { return alone() };
        let shared = &*self.shared;
        // Closed before its fields change: a thread that still looks at the old job must find nothing.
        shared.ticket.store(Ticket::of(*job, u32::MAX), Ordering::SeqCst);
        *job = job.wrapping_add(1);
        shared.finished.store(0, Ordering::SeqCst);
        shared.pieces.store(pieces as u32, Ordering::SeqCst);
        shared.work.store((&raw const work).cast_mut().cast(), Ordering::SeqCst);
        shared.ticket.store(Ticket::of(*job, 0), Ordering::SeqCst);
        for helper in &self.helpers {
            if helper.sleeps.swap(false, Ordering::SeqCst) {
                helper.thread.thread().unpark();
            }
        }
        shared.help(*job);
        self.wait(pieces as u32);
        shared.work.store(null_mut(), Ordering::SeqCst);
        let panicked = shared.panicked.swap(false, Ordering::SeqCst);
        drop(job);
        assert!(!panicked, "work of the CPU's threads has panicked");
    }

    /// Until all pieces are finished. Who holds the last may be put aside by the kernel: to sleep then
    /// lets it run here.
    fn wait(&self, pieces: u32) {
        let shared = &*self.shared;
        for _ in 0..WAIT_SPINS {
            if shared.finished.load(Ordering::SeqCst) == pieces {
                return;
            }
            std::hint::spin_loop();
        }
        *shared.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        loop {
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            if shared.finished.load(Ordering::SeqCst) == pieces {
                shared.caller_sleeps.store(false, Ordering::SeqCst);
                return;
            }
            thread::park();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread.thread().unpark();
            let _ = helper.thread.join(); // its panics have been told to the caller
        }
    }
}

/// The life of a helper.
fn attend(shared: &Shared, sleeps: &AtomicBool) {
    let mut done = 0;
    let mut spins = 0;
    while !shared.ends.load(Ordering::SeqCst) {
        let job = Ticket::job(shared.ticket.load(Ordering::SeqCst));
        if job != done {
            shared.help(job);
            (done, spins) = (job, 0);
        } else if spins < IDLE_SPINS {
            spins += 1;
            std::hint::spin_loop();
        } else {
            sleeps.store(true, Ordering::SeqCst);
            if Ticket::job(shared.ticket.load(Ordering::SeqCst)) == done && !shared.ends.load(Ordering::SeqCst) {
                thread::park();
            }
            sleeps.store(false, Ordering::SeqCst);
            spins = 0;
        }
    }
}

fn current() -> &'static RwLock<Arc<Pool>> {
    static POOL: OnceLock<RwLock<Arc<Pool>>> = OnceLock::new();
    POOL.get_or_init(|| RwLock::new(Arc::new(Pool::new(default_size()))))
}

/// The processors that this process may use: those of its affinity, and no more than the quota of
/// its cgroup.
pub fn default_size() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The process's pool, made at the first call.
pub fn shared() -> Arc<Pool> {
    Arc::clone(&current().read().unwrap_or_else(PoisonError::into_inner))
}

/// Replaces the process's pool by one of `size` threads. Jobs that run end on the old one.
pub fn resize(size: usize) {
    let mut pool = current().write().unwrap_or_else(PoisonError::into_inner);
    if pool.size() != size {
        *pool = Arc::new(Pool::new(size));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// How often each piece was run.
    fn counts(pool: &Pool, pieces: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
        pool.run(pieces, &|piece| {
            counts[piece].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_piece_runs_once() {
        for size in [1, 2, 3, 8] {
            let pool = Pool::new(size);
            assert_eq!(pool.size(), size);
            for round in 0..3_000 {
                // Jobs of all sizes in turns: a thread that is late must not work on the next job as on its own.
                let pieces = [0, 1, 2, 100, 3, 7][round % 6];
                assert!(counts(&pool, pieces).iter().all(|&count| count == 1), "{size} threads, round {round}");
            }
        }
    }

    #[test]
    fn threads_that_sleep_wake_up() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            thread::sleep(std::time::Duration::from_millis(2));
            assert!(counts(&pool, 50).iter().all(|&count| count == 1));
        }
    }

    #[test]
    fn callers_at_once_all_get_their_work_done() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        assert!(counts(&pool, 20).iter().all(|&count| count == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn work_may_have_work_done() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        pool.run(4, &|_| {
            sum.fetch_add(counts(&pool, 5).iter().sum(), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 20);
    }

    #[test]
    fn a_panic_reaches_the_caller_when_all_are_done() {
        let pool = Pool::new(2);
        let done = AtomicUsize::new(0);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(10, &|piece| {
                done.fetch_add(1, Ordering::Relaxed);
                assert_ne!(piece, 3);
            });
        }));
        assert!(caught.is_err());
        assert_eq!(done.into_inner(), 10);
        assert!(counts(&pool, 10).iter().all(|&count| count == 1));
    }
}
