/**
 * Reads the inventory of a training cluster, and tells scripts which nodes
 * there are, which of them answer, which one is the coordinator, which URLs to
 * pull data from, and what a command prints on each node.
 *
 * @example Print the nodes that answer
 * ```ts
 * import { discoverReachableNodes } from "@ringrift/cluster-hosts";
 *
 * const source = "config/demo_hosts.yaml";
 *
 * for (const { node, address, status } of await discoverReachableNodes({ source })) {
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
  foldNames,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getDataSyncUrls,
  getEloSyncConfig,
  getEloSyncUrls,
  getSyncUrls,
  HostsConfigError,
  loadHostsConfig,
  MODEL_SYNC_PORT,
  parseHostsConfig,
  probeNode,
  probeNodes,
  runOnNodes,
  selectNodes,
  sshCommand,
  validateHostsConfig,
  waitForNodes,
  watchNodes,
} from "./cluster_hosts.ts";
export type {
  ClusterNodeFields,
  CommandFailure,
  CommandFailureCode,
  CommandResult,
  ConfigProblem,
  ConfigReport,
  ConfigSource,
  CoordinatorAddress,
  DataSyncUrlOptions,
  DiscoverOptions,
  EloSyncConfig,
  Endpoint,
  FailureCode,
  HostEntry,
  HostsConfig,
  LoadOptions,
  NodeProbe,
  NodeSelection,
  NodeState,
  ProbeFailure,
  ProbeOptions,
  ReachableNode,
  RunOptions,
  SshOptions,
  StatusDocument,
  SweepOptions,
  SyncUrlOptions,
  WaitOptions,
  WatchOptions,
} from "./cluster_hosts.ts";
