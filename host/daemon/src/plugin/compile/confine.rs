//! Locks the compiling child in before it reads a byte of the module: no files, no network, no other process.
//!
//! A fault in the compiler that a module exploits then finds nothing to reach but the pipes to the host. What the kernel lacks is reported,
//! not fatal: the bounds on memory and time hold without it.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

use super::report::Confinement;

/// System calls that a compiler needs: memory, threads, time, and files that are open already. `memfd_create` makes a file in memory, under
/// the bound on memory; nothing here opens one by its name.
const ALLOWED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_fcntl,
    libc::SYS_ftruncate,
    libc::SYS_close,
    libc::SYS_memfd_create,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_membarrier,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Confine the calling thread and all that it starts, for ever. To be called while it is the process's only thread.
pub(super) fn confine() -> Confinement {
    // Landlock first: the filter does not let its system calls through.
    Confinement { landlock: no_files_nor_network().unwrap_or(false), seccomp: only_allowed_calls().is_ok() }
}

/// Answers whether the kernel enforces at least a part of it.
fn no_files_nor_network() -> Result<bool, landlock::RulesetError> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn only_allowed_calls() -> Result<(), String> {
    let program = filter().map_err(|error| error.to_string())?;
    apply_filter(&program).map_err(|error| error.to_string())
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let threads_only = u64::from(libc::CLONE_THREAD.cast_unsigned());
    rules.insert(libc::SYS_clone, vec![on_argument(0, SeccompCmpOp::MaskedEq(threads_only), threads_only)?]);
    // A process that aborts sends itself a signal.
    let own_process = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![on_argument(0, SeccompCmpOp::Eq, own_process)?]);
    rules.insert(libc::SYS_prctl, vec![on_argument(0, SeccompCmpOp::Eq, u64::from(libc::PR_SET_NAME.cast_unsigned()))?]);
    // Not a signal that kills, and not "forbidden" either: whatever has another way then takes that one. So does the C library where it
    // would start threads by clone3, whose flags no filter can see.
    let denied = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    SeccompFilter::new(rules, denied, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()
}

fn on_argument(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    /// Both bind the calling thread alone, so that a test needs no process of its own.
    fn confined<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        let work = || {
            assert!(confine().seccomp, "this kernel filters system calls");
            work()
        };
        std::thread::spawn(work).join().expect("it ends")
    }

    #[test]
    fn no_file_can_be_opened_and_no_process_started() {
        let folder = tempfile::tempdir().expect("folder");
        let file = folder.path().join("new");
        let refused = confined(move || {
            [
                File::open("/etc/passwd").is_err(),
                File::open("/proc/self/mem").is_err(),
                File::create(file).is_err(),
                std::fs::read_dir("/").is_err(),
                std::fs::metadata("/etc/passwd").is_err(),
                Command::new("/bin/true").status().is_err(),
            ]
        });
        assert_eq!(refused, [true; 6]);
    }

    #[test]
    fn no_network_can_be_reached() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let refused = confined(move || {
            [TcpStream::connect(address).is_err(), UdpSocket::bind("127.0.0.1:0").is_err(), UnixStream::pair().is_err()]
        });
        assert_eq!(refused, [true; 3]);
    }

    #[test]
    fn other_processes_get_no_signal() {
        let parent = rustix::process::getppid().expect("a parent");
        assert!(confined(move || rustix::process::test_kill_process(parent)).is_err());
    }

    #[test]
    fn memory_threads_and_open_files_stay() {
        let mut open = tempfile::tempfile().expect("a file");
        confined(move || {
            use std::io::{Read as _, Seek as _, Write as _};
            open.write_all(&vec![7; 1 << 20]).expect("written");
            open.rewind().expect("back");
            let mut read = Vec::new();
            open.read_to_end(&mut read).expect("read");
            let sum: usize = std::thread::spawn(move || read.into_iter().map(usize::from).sum()).join().expect("a thread");
            assert_eq!(sum, 7 << 20);
        });
    }
}
