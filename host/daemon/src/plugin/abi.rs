//! The contract's generated code: one module for each version of the WIT package, the newest as [`latest`].
//!
//! Everything outside this module speaks `latest`. When the package gets a new version, its module is added here, and what an older one
//! says is converted once, at this edge.

pub(super) mod v0_1 {
    //! `laelaps:worker@0.1.0`.
    #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "plugin",
        imports: {
            "laelaps:worker/context.heartbeat": async | trappable,
            "laelaps:worker/context.update-data": async | trappable,
            "laelaps:worker/context.submit": async | trappable,
            "laelaps:worker/context.[method]submission.submit": async | trappable,
            "laelaps:worker/context.deadline": async | trappable,
            default: trappable,
        },
        exports: { default: async },
        with: { "laelaps:worker/context.submission": crate::plugin::submission::Submission },
    });
}

pub(super) use v0_1 as latest;

/// A component linked against the newest version of the contract that it fits.
pub(super) type PluginPre = latest::PluginPre<super::guest::Guest>;
