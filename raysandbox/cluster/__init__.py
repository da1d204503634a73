"""The cluster around the task: identities, mutual TLS, a guarded GCS, admission.

Ray's token is one secret that every worker has, and its TLS takes any
certificate of the CA for anything. In a raysandbox cluster each component has
an identity with a role, and a guard (Envoy) in front of the GCS decides by
identity, method and content.

::

    errors      ClusterError: what can't be done, where, and the remedy
    settings    cluster.toml, inventory.toml, and the files of a cluster directory
    pki         CA, leaf certificates, worker certificates, CRL, CSR
    methods     which role may call which method of the GCS
    guard       settings -> Envoy's bootstrap, listeners and clusters (pure)
    shapes      identifiers of a request that the GCS would abort on (pure)
    access      identity + request + what is known -> allowed or why not (pure)
    audit       hash-chained log, its rotation, queries and verification
    watch       nodes in the GCS that did not pass the guard
    supervisor  runs guard, access service, audit and watcher; restarts them
    surfaces    what listens on this machine, and what is open
    start       `ray start` with all of it
"""
