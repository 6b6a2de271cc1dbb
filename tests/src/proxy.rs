//! A network cable that can be cut: between one process and one server only.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Forwards connections to a server. While it is cut, connections stay open and every byte of either side is dropped; when it is mended, what
/// was connected before is closed, as both ends would find out by then.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    /// Grows with every cut and every mending; odd while cut.
    state: Arc<watch::Sender<u32>>,
    listening: AbortHandle,
}

impl Proxy {
    /// A proxy to a port on this machine.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn to(port: u16) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let state = Arc::new(watch::Sender::new(0));
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listening = tokio::spawn(listen(listener, server, Arc::clone(&state))).abort_handle();
        Proxy { port: address.port(), state, listening }
    }

    /// Where to connect instead, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on nothing gets through.
    pub fn cut(&self) {
        self.state.send_modify(|state| *state |= 1);
    }

    /// From now on new connections get through.
    pub fn mend(&self) {
        self.state.send_modify(|state| *state = (*state | 1) + 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn listen(listener: TcpListener, server: SocketAddr, state: Arc<watch::Sender<u32>>) {
    while let Ok((client, _)) = listener.accept().await {
        let state = state.subscribe();
        tokio::spawn(async move {
            let begun = *state.borrow();
            let Ok(server) = TcpStream::connect(server).await else { return };
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            let mut over = state.clone();
            tokio::select! {
                () = forward(from_client, to_server, &state) => {}
                () = forward(from_server, to_client, &state) => {}
                // Of what began before the mending, bytes may be missing.
                _ = over.wait_for(|now| *now % 2 == 0 && *now > begun) => {}
            }
        });
    }
}

async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, state: &watch::Receiver<u32>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(length) = from.read(&mut bytes).await
        && length > 0
    {
        let is_cut = *state.borrow() % 2 == 1;
        if !is_cut && to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
    // The end of a connection does not get through a cut cable either.
    if *state.borrow() % 2 == 1 {
        std::future::pending().await
    }
}
