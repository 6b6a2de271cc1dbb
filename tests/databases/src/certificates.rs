//! What a server needs to speak encrypted, made with the `openssl` command.

use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::server;

const AUTHORITY: &str = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=laelaps-tests
    -keyout authority.key -out authority.pem";
const REQUEST: &str =
    "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -addext subjectAltName=DNS:localhost
    -keyout server.key -out server.csr";
const SIGN: &str = "x509 -req -in server.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 -copy_extensions copy
    -out server.pem";

/// An authority that nobody else knows, and a certificate that it signed for the host name `localhost`, and for no address.
#[derive(Debug)]
pub struct Certificates {
    folder: TempDir,
}

impl Certificates {
    /// Makes them anew.
    ///
    /// # Panics
    /// If there is no `openssl`.
    #[must_use]
    pub fn make() -> Self {
        let folder = server::folder();
        for arguments in [AUTHORITY, REQUEST, SIGN] {
            let mut openssl = Command::new("openssl");
            openssl.args(arguments.split_whitespace()).current_dir(folder.path());
            server::prepare(openssl);
        }
        Self { folder }
    }

    /// The authority's certificate: what clients trust.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("authority.pem")
    }

    pub(crate) fn certificate(&self) -> PathBuf {
        self.folder.path().join("server.pem")
    }

    pub(crate) fn key(&self) -> PathBuf {
        self.folder.path().join("server.key")
    }
}
