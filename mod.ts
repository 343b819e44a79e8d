/**
 * The hosts of a training cluster, from one YAML inventory: which there are, which is the coordinator, which answer,
 * and from which URLs data can be pulled.
 *
 * @example Who answers?
 * ```ts
 * import { discoverReachableNodes } from "@ringrift/cluster-hosts";
 *
 * for (const { node, status, address } of await discoverReachableNodes({ source: "config/demo_hosts.yaml", timeoutMs: 500 })) {
 *   console.log(`${node.name} at ${address}: version ${status.version}`);
 * }
 * ```
 *
 * @module
 */
export {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  DATA_SYNC_PORT,
  DEFAULT_CONFIG_PATH,
  discoverReachableNodes,
  ELO_SYNC_PORT,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getDataSyncUrls,
  getEloSyncConfig,
  getEloSyncUrls,
  getSyncUrls,
  HostsConfigError,
  inspectHostsConfig,
  loadHostsConfig,
  MODEL_SYNC_PORT,
  parseHostsConfig,
  probeNode,
  probeNodes,
  readHostsConfig,
  selectNodes,
  sshCommand,
} from "./cluster_hosts.ts";
export type {
  ClusterNodeFields,
  ConfigProblem,
  ConfigSource,
  CoordinatorAddress,
  DataSyncUrlOptions,
  DiscoverOptions,
  EloSyncConfig,
  FailureCode,
  HostEntry,
  HostsConfig,
  HostsConfigReport,
  HostsConfigText,
  HttpCheckOptions,
  LoadOptions,
  NodeProbe,
  NodeSelection,
  NodeState,
  ProbeFailure,
  ProbeOptions,
  ReachableNode,
  SshOptions,
  StatusDocument,
  SweepOptions,
  SyncUrlOptions,
} from "./cluster_hosts.ts";
