//! Work beside the tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// As many loops as the machines of the project have processors.
const LOOPS: usize = 2;

/// Two busy loops, until dropped; they end with this process, whatever ends it.
pub(crate) struct Load {
    over: Arc<AtomicBool>,
    loops: Vec<JoinHandle<()>>,
}

impl Load {
    pub(crate) fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let turn = |over: Arc<AtomicBool>| {
            move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            }
        };
        let loops = (0..LOOPS).map(|_| std::thread::spawn(turn(Arc::clone(&over)))).collect();
        println!("tests/run: {LOOPS} busy loops run beside the tests");
        Self { over, loops }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for turn in self.loops.drain(..) {
            // A loop has nothing that could panic.
            let _ = turn.join();
        }
    }
}
