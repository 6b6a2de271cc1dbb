//! Signals, each turned into one of the host's verbs.
//!
//! | signal | verb |
//! | --- | --- |
//! | TERM, INT | graceful shutdown; a second one: immediate |
//! | QUIT | immediate shutdown |
//! | USR1 | graceful restart |
//! | HUP | immediate restart |
//! | CONT | graceful binary replace |
//! | WINCH | immediate binary replace |
//! | USR2 | reopen log files |

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// How a stop treats what runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Manner {
    /// Ask handlers to come to an end, and wait for them.
    Graceful,
    /// Stop them now and give their tasks back.
    Immediate,
}

/// What a signal asks of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// End the process.
    Shutdown(Manner),
    /// Read the configuration again and rebuild everything but the process.
    Restart(Manner),
    /// Look at the plugin folder now; attempts on replaced versions come to an end.
    Replace(Manner),
    /// Open the log file anew.
    ReopenLogs,
}

/// The signals of this process, from the moment of [`Signals::install`] on.
pub(crate) struct Signals {
    /// With their names.
    streams: Vec<(Signal, &'static str, Verb)>,
    shutdowns: u32,
}

impl Signals {
    /// Take over the signals. To be called first of all: an early HUP would end the process.
    ///
    /// # Errors
    /// The operating system's refusal to install a handler.
    pub(crate) fn install() -> io::Result<Self> {
        use Manner::{Graceful, Immediate};
        let kinds = [
            (SignalKind::terminate(), "TERM", Verb::Shutdown(Graceful)),
            (SignalKind::interrupt(), "INT", Verb::Shutdown(Graceful)),
            (SignalKind::quit(), "QUIT", Verb::Shutdown(Immediate)),
            (SignalKind::user_defined1(), "USR1", Verb::Restart(Graceful)),
            (SignalKind::hangup(), "HUP", Verb::Restart(Immediate)),
            (SignalKind::from_raw(rustix::process::Signal::CONT.as_raw()), "CONT", Verb::Replace(Graceful)),
            (SignalKind::window_change(), "WINCH", Verb::Replace(Immediate)),
            (SignalKind::user_defined2(), "USR2", Verb::ReopenLogs),
        ];
        let streams = kinds.into_iter().map(|(kind, name, verb)| Ok((signal(kind)?, name, verb))).collect::<io::Result<_>>()?;
        Ok(Self { streams, shutdowns: 0 })
    }

    /// The next verb. Cancel-safe: a signal is delivered to this call or to a later one.
    pub(crate) async fn next(&mut self) -> Verb {
        let (name, mut verb) = std::future::poll_fn(|context| {
            for (stream, name, verb) in &mut self.streams {
                if let std::task::Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return std::task::Poll::Ready((*name, *verb));
                }
            }
            std::task::Poll::Pending
        })
        .await;
        if let Verb::Shutdown(_) = verb {
            self.shutdowns += 1;
            if self.shutdowns > 1 {
                verb = Verb::Shutdown(Manner::Immediate);
            }
        }
        crate::audit::signal(name, verb);
        verb
    }
}
