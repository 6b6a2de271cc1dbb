//! Answers of a server that never arrive, although it did what was asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use laelaps_queue::{Claim, Config, Connections, Event, HostDescription, LeaseAnswer, Queue, State};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::fixture::{Database, Fixture, LONG, finish, keys, patient, settled};

/// Stands between the queue and the server, and can swallow the server's next answer to what contains `committing`, and cut the connection
/// instead.
struct Swallower {
    url: String,
    armed: Arc<AtomicBool>,
}

impl Swallower {
    async fn before(url: &str, committing: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (before, database) = url.rsplit_once('/').unwrap();
        let (user, address) = before.rsplit_once('@').unwrap();
        let (address, armed) = (address.to_owned(), Arc::new(AtomicBool::new(false)));
        let port = listener.local_addr().unwrap().port();
        let swallowing = Arc::clone(&armed);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&address).await.unwrap();
                tokio::spawn(pass_on(client, server, Arc::clone(&swallowing), committing));
            }
        });
        Self { url: format!("{user}@127.0.0.1:{port}/{database}"), armed }
    }
}

async fn pass_on(mut client: TcpStream, mut server: TcpStream, armed: Arc<AtomicBool>, committing: &[u8]) {
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut swallows = false;
    loop {
        tokio::select! {
            read = client.read(&mut asked) => match read {
                Ok(bytes @ 1..) => {
                    let commits = committing.is_empty() || asked[..bytes].windows(committing.len()).any(|part| part == committing);
                    swallows |= commits && armed.swap(false, Ordering::AcqRel);
                    server.write_all(&asked[..bytes]).await.unwrap();
                }
                _ => return,
            },
            read = server.read(&mut answered) => match read {
                Ok(1..) if swallows => return,
                Ok(bytes @ 1..) => client.write_all(&answered[..bytes]).await.unwrap(),
                _ => return,
            },
        }
    }
}

/// Claims, settlements and a cancellation whose answers are lost. `committing` is in what a client sends when it makes an operation durable.
pub(crate) async fn what_was_done_although_the_answer_was_lost_is_told_as_done(database: Database, committing: &'static [u8]) {
    let fixture = Fixture::new(database).await;
    let swallower = Swallower::before(&fixture.config.url, committing).await;
    let connections = Connections { listen: false, ..patient() };
    let queue = Queue::open(&Config { connections, url: swallower.url.clone(), ..fixture.config.clone() }).await.unwrap();
    let lose_the_next_answer = || swallower.armed.store(true, Ordering::Release);
    let was_lost = || assert!(!swallower.armed.load(Ordering::Acquire), "an answer was lost");
    let backend = queue.backend();
    let host = backend.register_host(&HostDescription { name: "far".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let claim = Claim::new(host, 4, LONG);
    // Each statement is prepared first, in an exchange of its own.
    fixture.submit_some("warm", 3).await;
    let warm = backend.claim(&claim).await.unwrap().tasks;
    for (task, event) in warm.iter().zip([finish(), Event::Retry { delay: Some(LONG) }, finish()]) {
        assert_eq!(backend.settle(&[settled(task, event)]).await.unwrap(), [LeaseAnswer::Held]);
    }
    fixture.submit_some("a", 3).await;
    lose_the_next_answer();
    let claimed = backend.claim(&claim).await.unwrap().tasks;
    assert_eq!(keys(&claimed), ["a0", "a1", "a2"]);
    was_lost();
    for (task, event) in claimed.iter().zip([finish(), Event::Retry { delay: Some(LONG) }, Event::Stopped]) {
        lose_the_next_answer();
        assert_eq!(backend.settle(&[settled(task, event)]).await.unwrap(), [LeaseAnswer::Held], "{}", task.key);
        was_lost();
        assert_eq!(backend.settle(&[settled(task, finish())]).await.unwrap(), [LeaseAnswer::Lost], "{}", task.key);
    }
    assert_eq!((fixture.state("a0").await, fixture.get("a1").await.attempts), (State::Finished, 1));
    lose_the_next_answer();
    queue.cancel("a2").await.unwrap();
    was_lost();
    assert_eq!(fixture.state("a2").await, State::Cancelled);
    queue.close().await;
    fixture.audit().await;
}
