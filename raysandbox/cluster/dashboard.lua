-- Who speaks to the dashboard's front; what each role may do there, its RBAC says.

function envoy_on_request(handle)
  local uri, why = identity(handle)
  if uri == nil then return refuse(handle, why) end
end
