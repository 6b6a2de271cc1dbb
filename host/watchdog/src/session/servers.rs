//! The server list, and a look at each server when none of them lets us in.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Error, Result, root};

/// Servers in a list at most.
const SERVERS_MAX: usize = 64;
/// How long one server may take to answer when we look at it.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);

/// `host:port` of each server of a list. The client reads the list itself; this finds what is wrong with it, and where.
pub(super) fn parse(list: &str) -> Result<Vec<String>> {
    let wrong = |problem: String| Error::config("servers", list, problem);
    let (hosts, chroot) = match list.find('/') {
        Some(at) => list.split_at(at),
        None => (list, "/"),
    };
    if hosts.ends_with(':') && chroot.starts_with("//") {
        return Err(wrong("plain host:port is expected, without a protocol in front".to_owned()));
    }
    if chroot != "/"
        && let Some(problem) = root::wrong_with(chroot)
    {
        return Err(wrong(format!("the chroot {chroot:?}: {problem}")));
    }
    let servers = hosts.split(',').map(server).collect::<std::result::Result<Vec<_>, _>>().map_err(wrong)?;
    if servers.len() > SERVERS_MAX {
        return Err(wrong(format!("{} servers, at most {SERVERS_MAX} are allowed", servers.len())));
    }
    Ok(servers)
}

/// One server with its port, or what is wrong with it.
fn server(text: &str) -> std::result::Result<String, String> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bare.unwrap_or(host).is_empty() {
        return Err(format!("{text:?} names no host; expected host:port, separated by commas"));
    }
    if host.chars().any(char::is_whitespace) {
        return Err(format!("{text:?} has a space in it"));
    }
    if bare.is_none() && host.contains(':') {
        return Err(format!("{text:?}: an IPv6 address stands in brackets, [::1]:2181"));
    }
    match port.map(str::parse::<u16>) {
        None => Ok(format!("{host}:2181")),
        Some(Ok(port)) if port > 0 => Ok(format!("{host}:{port}")),
        _ => Err(format!("{text:?} has no port from 1 to 65535")),
    }
}

/// What each server does when asked for its mode, in the order of the list.
pub(super) async fn look_at(servers: &[String]) -> Vec<String> {
    let looks: Vec<_> = servers.iter().cloned().map(|server| tokio::spawn(async move { look(&server).await })).collect();
    let mut seen = Vec::with_capacity(looks.len());
    for (server, look) in servers.iter().zip(looks) {
        seen.push(format!("{server} {}", look.await.unwrap_or_else(|_| "could not be looked at".to_owned())));
    }
    seen
}

async fn look(server: &str) -> String {
    let asked = async {
        let mut stream = TcpStream::connect(server).await?;
        stream.write_all(b"srvr").await?;
        let mut answer = Vec::new();
        stream.take(4_096).read_to_end(&mut answer).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&answer).into_owned())
    };
    match tokio::time::timeout(LOOK_PATIENCE, asked).await {
        Err(_) => format!("did not answer within {LOOK_PATIENCE:?}"),
        Ok(Err(error)) => format!("cannot be reached: {error}"),
        Ok(Ok(answer)) => match answer.lines().find_map(|line| line.strip_prefix("Mode: ")) {
            Some(mode) => format!("answers as {mode}, but gave us no session"),
            None if answer.contains("not currently serving") => "is up, but its ensemble has no majority".to_owned(),
            None => "answers, but not as a ZooKeeper server that tells its mode".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_list_is_read_whole_or_refused_with_the_reason() {
        assert_eq!(parse("a:7000,b,[::1]:9/x/y").unwrap(), ["a:7000", "b:2181", "[::1]:9"]);
        for (list, reason) in [
            ("", "names no host"),
            ("a:7000,", "names no host"),
            (":2181", "names no host"),
            ("a:0", "no port"),
            ("a:port", "no port"),
            ("a:70000", "no port"),
            ("::1:2181", "brackets"),
            ("a b:1", "space"),
            ("tcp://a:1", "without a protocol"),
            ("a:1/x//y", "chroot"),
        ] {
            let error = parse(list).unwrap_err().to_string();
            assert!(error.contains(reason), "{list:?}: {error}");
        }
    }
}
