-- What each of the other files here begins with: who speaks, which is what a certificate
-- says, if who signed it may say so.

local CLUSTER = "@CLUSTER@"
local ISSUERS = @ISSUERS@

local function refuse(handle, why)
  handle:streamInfo():dynamicMetadata():set("rsb", "why", why)
  handle:respond({[":status"] = "403"}, "raysandbox: " .. why)
end

-- Said last, of a request that may go on: Envoy goes on with one on which a script fails,
-- and RBAC refuses what nobody has said this of.
local function checked(handle)
  handle:streamInfo():dynamicMetadata():set("rsb", "checked", "yes")
end

-- The issuer is part of the identity: a node's own issuer signs its workers and
-- nothing else, or one stolen node could make itself an operator.
local function identity(handle)
  local ssl = handle:streamInfo():downstreamSslConnection()
  if ssl == nil then return nil, "no TLS" end
  local sans = ssl:uriSanPeerCertificate()
  if #sans ~= 1 then return nil, "the certificate names no identity" end
  local role, name = string.match(sans[1], "^spiffe://" .. CLUSTER .. "/([a-z]+)/([a-z0-9.-]+)/[a-z0-9.-]+$")
  if role == nil then return nil, "the certificate's identity is of another cluster" end
  local issuer = ssl:issuerPeerCertificate()
  if role == "worker" then
    if issuer ~= "CN=workers of " .. name then
      return nil, "a worker's certificate from an issuer that is not its node's"
    end
  elseif issuer ~= ISSUERS[role] then
    return nil, "a certificate from a CA that does not sign this role's"
  end
  return sans[1], role, role .. "/" .. name
end

-- The access service is told, or asked: whether it says yes.
local function agreed(handle, path, more, body)
  local headers = {[":method"] = "POST", [":path"] = path, [":authority"] = "access"}
  for name, value in pairs(more) do headers[name] = value end
  local answer = handle:httpCall("access", headers, body, 2000)
  return answer ~= nil and answer[":status"] == "200"
end
