//! Looking at a module without serving it.

use std::sync::Arc;

use wasmtime::component::Component;

use super::abi::PluginPre;
use super::compile::Failure;
use super::{Digest, Engine, Error, fit, reason};

/// What a module is, and whether a host would serve it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Inspection {
    /// The digest of its bytes.
    pub digest: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// What it needs. Empty if it is no component.
    pub imports: Vec<Item>,
    /// What it provides. Empty if it is no component.
    pub exports: Vec<Item>,
    /// Imports, exports and functions that are left out because there are too many, or their names and types are too long.
    pub left_out: usize,
    /// The version of the contract that it fits (`laelaps:worker@0.1.0`), and starts under. None: see `problems`.
    pub fits: Option<String>,
    /// Exactly what is wrong with it, most important first. Empty if it fits.
    pub problems: Vec<String>,
}

/// An import or export.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Item {
    /// Its name, with its version: `laelaps:worker/context@0.1.0`.
    pub name: String,
    /// Whether it is an interface (an instance), rather than a function or something else.
    pub is_instance: bool,
    /// Its functions: name, and type as WIT writes it.
    pub functions: Vec<(String, String)>,
}

impl Engine {
    /// Look at a module as a host does before it serves it: compile it, link it, and start it once without calling its handler.
    ///
    /// # Errors
    /// If the machinery fails. A module that is no component, that does not fit or does not start, is an answer: [`Inspection::problems`].
    pub async fn inspect(self: &Arc<Self>, bytes: &[u8]) -> Result<Inspection, Error> {
        let digest = Digest::of(bytes);
        let mut inspection = Inspection {
            digest,
            size_bytes: bytes.len() as u64,
            imports: Vec::new(),
            exports: Vec::new(),
            left_out: 0,
            fits: None,
            problems: Vec::new(),
        };
        let compiled = match self.compiler.component(&self.wasmtime, bytes, digest).await {
            Ok(compiled) => compiled,
            Err(Failure::Refused(reason)) => {
                inspection.problems.push(reason);
                return Ok(inspection);
            }
            Err(Failure::Unable(reason)) => return Err(Error::Refused(reason)),
        };
        (inspection.imports, inspection.exports) = (compiled.imports, compiled.exports);
        inspection.left_out = compiled.left_out;
        let tried = match compiled.component {
            Ok(component) => self.try_out(&component).await.map(drop),
            Err(problems) => {
                inspection.problems = problems.iter().map(|problem| reason::tidy(problem)).collect();
                return Ok(inspection);
            }
        };
        match tried {
            Ok(()) => inspection.fits = Some(fit::contract()),
            Err(Failure::Refused(reason) | Failure::Unable(reason)) => inspection.problems.push(reason),
        }
        Ok(inspection)
    }
    /// Link a component and start it once.
    pub(super) async fn try_out(self: &Arc<Self>, component: &Component) -> Result<PluginPre, Failure> {
        let pre = self.link(component).map_err(|problem| Failure::Refused(reason::tidy(&problem)))?;
        self.self_test(&pre).await?;
        Ok(pre)
    }
}
